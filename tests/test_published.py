"""Published measurements: what their tables say, what models are built from it, and how predictions are judged."""

import csv
import json
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import published
import pytest
import torch
from published_kernels import dropout, dropout_add, entropy, fused_entropy
from published_megatron import DEEPSEEK, read_megatron
from published_metrics import Predicted, kendall_tau, regret, summaries
from published_models import FAMILIES, loss_kind, loss_of, workload
from published_parts import Experts
from published_rates import model_flops, rates_of
from published_rows import DATA, FILES, kind_of, read
from published_run import GIB, Run, Shape, Skipped
from published_systems import Prediction
from published_training import dtype_of, gpu_name, read_training
from torch.nn import functional

from weft.capture import capture
from weft.capture.profile import LOSS

TABLES = {kind: read(DATA / name) for kind, name in FILES.items()}


def raw(kind: str) -> list[dict[str, str]]:
    with (DATA / FILES[kind]).open(newline="") as file:
        return list(csv.DictReader(file))


def training_row(**cells: str) -> dict[str, str]:
    """A row of training_runs.csv: Megatron on 8 A100, with some cells changed."""
    row = defaultdict(str, source="Megatron paper", model="GPT 1B", params_B="", layers="24", hidden="1920", heads="16")
    row |= dict(
        seq_len="1024", global_batch_seqs="64", micro_batch="4", gpu="A100-80GB-SXM", num_gpus="8", dtype="fp16"
    )
    row |= dict(vocab="50257", dp="2", tp="4", pp="1", zero_or_fsdp="0", recompute="full", sequence_parallel="0")
    return row | dict(tier="A", step_time_s="1.5") | cells


def run_of(**cells: str) -> Run:
    found = read_training(training_row(**cells), 1)
    assert isinstance(found, Run), found
    return found


def megatron_row(test: str, **cells: str) -> Run:
    row = defaultdict(str, {"test_case": test, "golden": "golden_values_dev_dgx_h100.json", "platform": "h100"})
    row |= {"nodes": "1", "gpus_per_node": "8", "num-layers": "12", "hidden-size": "512", "num-attention-heads": "8"}
    row |= {"seq-length": "1024", "micro-batch-size": "4", "global-batch-size": "32", "bf16": "true", "n_points": "99"}
    found = read_megatron(row | {name.replace("_", "-"): value for name, value in cells.items()}, 1)
    assert isinstance(found, Run), found
    return found


# -- what tables say ---------------------------------------------------------------------------------------------------


def test_no_row_of_our_own_tables_is_lost():
    for kind, (runs, skipped) in TABLES.items():
        assert sorted(x.row for x in [*runs, *skipped]) == list(range(1, len(raw(kind)) + 1))
    assert [len(skipped) for _, skipped in TABLES.values()] == [0, 0, 23]
    reasons = {s.reason.partition(",")[0].partition(":")[0] for s in TABLES["megatron-memory"][1]}
    assert reasons == {"reinforcement learning", "Mamba layers", "a vision tower"}


def test_kinds_of_tables_are_told_from_their_columns():
    assert [kind_of(DATA / name) for name in FILES.values()] == list(FILES)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A100-40GB (DGX-A100)", "a100-40"),
        ("A100", "a100"),
        ("H100-96GB-HBM2e(500W, 2.4TB/s)", "h100-96"),
        ("H100-80GB-SXM", "h100-80"),
        ("V100-32GB (DGX-2)", "v100-32"),
        ("gb200", "gb200"),
        ("H100 PCIe 80GB", "h100-pcie"),
        ("TPU v5e", "tpu v5e"),
    ],
)
def test_gpu_names(text, name):
    assert gpu_name(text) == name


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("fp16(?)", ("fp16", "")),
        ("bf16", ("bf16", "")),
        ("FP8-CS(unstated)", ("fp8", "cs")),
        ("fp8-rowwise", ("fp8", "rowwise")),
        ("fp8", ("fp8", "")),
        ("MXFP8", ("fp8", "mx")),
    ],
)
def test_dtypes(text, dtype):
    assert dtype_of(text) == dtype


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("full(?)", ("full", "uniform")),
        ("full(per layer)", ("full", "uniform")),
        ("selective", ("selective", "core")),
        ("selective(op)", ("selective", "op")),
        ("none(?)", ("none", "")),
        ("", ("none", "")),
    ],
)
def test_recomputation(text, mode):
    run = run_of(recompute=text)
    assert (run.recompute, run.recompute_what) == mode


@pytest.mark.parametrize(("text", "stage"), [("0", 0), ("1", 1), ("FSDP2(3)", 3), ("FSDP8", 3), ("", 1)])
def test_sharding(text, stage):
    assert run_of(zero_or_fsdp=text).zero == stage


def test_what_a_row_leaves_out_is_what_its_framework_did():
    assert run_of(sequence_parallel="").sequence_parallel
    assert not run_of(sequence_parallel="", tp="1", dp="8").sequence_parallel
    assert run_of(vpp="", pp="2", dp="1").vpp == 12
    assert run_of(vpp="3", pp="2", dp="1").vpp == 3
    assert (run_of(micro_batch="", pp="2", dp="1").micro_batch, run_of(micro_batch="").micro_batch) == (1, 4)
    torchtitan = run_of(source="torchtitan", model="llama3", recompute="", zero_or_fsdp="", params_B="8")
    assert (torchtitan.recompute, torchtitan.recompute_what, torchtitan.zero) == ("selective", "op", 3)
    assert run_of(source="torchtitan", model="llama3", recompute="", params_B="70").recompute == "full"


def test_degrees_that_are_not_given_make_up_the_devices():
    only_dp = run_of(dp="1", tp="", pp="", cp="", ep="")
    assert (only_dp.dp, only_dp.tp, only_dp.pp) == (1, 8, 1)
    only_tp = run_of(dp="", tp="2", pp="2")
    assert only_tp.dp == 2


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"layers": ""}, "layers not given"),
        ({"heads": "", "seq_len": "?"}, "heads, seq_len not given"),
        ({"global_batch_seqs": ""}, "global_batch_seqs not given"),
        ({"tp": "3"}, "dp=2 tp=3 pp=1 cp=1 do not make 8 GPUs"),
    ],
)
def test_rows_that_cannot_be_modelled_say_why(cells, reason):
    found = read_training(training_row(**cells), 7)
    assert found == Skipped("Megatron paper", 7, "GPT 1B", reason)


def test_models_have_as_many_parameters_as_their_rows_say():
    for run, row in zip(TABLES["training"][0], raw("training"), strict=True):
        assert run.shape.parameters == pytest.approx(1e9 * float(row["params_B"]), rel=0.04), run.model
    by_tie = {(run.model, run.shape.tied) for run in TABLES["training"][0]}
    assert {("llama-like 1.34B", True), ("llama-like 8.86B", False), ("GPT 16B", False), ("GPT 3.6B", True)} <= by_tie


def test_vocabularies_are_padded_by_megatron_only():
    assert run_of(tp="4").shape.vocab == 50688
    assert run_of(source="torchtitan", model="llama3").shape.vocab == 50260
    single = {run.tp: run.shape.vocab for run in TABLES["single-node"][0]}
    assert single == {1: 50304, 2: 50432, 4: 50688, 8: 51200}


# -- rates -------------------------------------------------------------------------------------------------------------


def test_rates_agree_with_rows_that_give_two():
    compared = 0
    for run, row in zip(TABLES["training"][0], raw("training"), strict=True):
        vocab = int(row["vocab"])  # sources count the vocabulary they print
        rates = rates_of(run, replace(run.shape, vocab=vocab), row["tflops_kind"])
        given = {"tokens": row["tokens_per_s_per_gpu"], "tflops": row["tflops_per_gpu"], "mfu": row["mfu_pct"]}
        for name, text in given.items():
            if text and name != run.derived:
                # Percentages are printed as whole numbers by one source.
                assert rates[name] == pytest.approx(float(text), rel=0.02), (run.source, name)
                compared += 1
    assert compared == 28


def test_step_times_are_those_the_notes_derive():
    for run, row in zip(TABLES["training"][0], raw("training"), strict=True):
        if found := re.search(r"derived step time ([\d.]+) s", row["notes"]):
            assert run.step_time_s == pytest.approx(float(found.group(1)), rel=2e-3)


def test_features_are_told_by_notes_and_by_when_it_was():
    assert run_of(notes="README says DP/TP/PP comm overlap on").features == {"overlap"}
    assert run_of(source="torchtitan", notes="compile async TP").features == {"async-tp"}
    for page, fused in (("llama3_h100_202412.md", False), ("asyncTP_2025-06.md", True), ("h200_202506.md", True)):
        run = run_of(source="torchtitan", source_ref=page, notes="compile")
        assert (loss_kind(run) == "fused") is fused
    assert loss_kind(run_of(source="torchtitan", source_ref="h200_202506.md", notes="eager")) == "plain"
    assert loss_kind(run_of()) == "in place"


def test_nanotron_cuts_when_the_weights_so_far_are_more_than_a_share():
    runs = {run.row: run for run in TABLES["training"][0] if run.framework == "nanotron" and run.pp > 1}
    # 16 blocks and a head of 4 blocks' weights: 10 are exactly half, so that the next one goes there as well.
    assert {run.stage_layers for run in runs.values() if run.shape.layers == 16} == {(11, 5)}
    assert {run.stage_layers for run in runs.values() if run.shape.layers == 32} == {(18, 14), (9, 9, 8, 6)}


def test_tokens_are_those_of_one_gpu():
    run = run_of(step_time_s="", tokens_per_s_per_gpu="1024")
    assert (run.step_time_s, run.derived) == (8.0, "tokens")


# -- Megatron's tests --------------------------------------------------------------------------------------------------


def test_flags_that_are_not_listed_have_their_defaults():
    run = megatron_row("gpt/gpt3_mcore_te_tp1_pp1_dist_optimizer")
    shape = run.shape
    assert (shape.ffn, shape.vocab, shape.tied, shape.gated, shape.bias) == (2048, 50304, True, False, True)
    assert (shape.norm, shape.positions, shape.dropout, shape.attention_dropout) == ("layer", "learned", 0.1, 0.1)
    assert (run.dp, run.tp, run.pp, run.vpp, run.zero, run.recompute) == (8, 1, 1, 1, 0, "none")
    assert (run.memory_rank, run.memory_of) == ("last", "allocated")


def test_flags_are_read():
    cells = {"tensor_model_parallel_size": "2", "pipeline_model_parallel_size": "2", "sequence_parallel": "true"}
    cells |= {"use_distributed_optimizer": "true", "num_layers_per_virtual_pipeline_stage": "1", "swiglu": "true"}
    run = megatron_row("gpt/gpt3_mcore_te_tp2_pp2", **cells, fp8_format='"e4m3"', vocab_size="1000")
    assert (run.dp, run.tp, run.pp, run.vpp, run.zero, run.sequence_parallel) == (2, 2, 2, 6, 1, True)
    assert (run.dtype, run.recipe, run.shape.ffn, run.shape.vocab) == ("fp8", "e4m3", 1344, 1024)
    full = megatron_row("gpt/x", recompute_granularity="full", recompute_method="block", recompute_num_layers="3")
    assert (full.recompute, full.recompute_what, full.recompute_layers) == ("full", "block", 3)


@pytest.mark.parametrize(
    ("test", "golden", "points", "attention"),
    [
        ("gpt/gpt3_mcore_te_tp1_pp1_resume_torch_dist", "dev_dgx_h100", "99", "flash"),
        ("gpt/gpt3_mcore_te_tp1_pp1_resume_torch_dist", "lts_dgxa100_dracooci", "100", "unfused"),
        ("gpt/gpt3_mcore_te_tp1_pp1_resume_torch_dist", "lts_dgx_a100", "21", "unfused"),
        ("gpt/gpt3_mcore_te_tp1_pp1_resume_torch_dist", "lts_dgx_a100", "99", "flash"),
        ("gpt/gpt3_mcore_te_tp1_pp1_dist_optimizer", "dev_dgx_h100", "49", "unfused"),
        ("gpt/gpt3_mcore_tp4_pp1_resume_torch", "dev_dgx_h100", "99", "unfused"),
        ("gpt/gpt3_7b_tp4_pp1_memory_speed", "dev_dgx_h100", "12", "flash"),
        ("t5/t5_mcore_te_tp4_pp1_resume_torch_dist", "dev_dgx_h100", "99", "unfused"),
        ("bert/bert_release", "dev_dgx_h100", "200", "unfused"),
    ],
)
def test_attention_of_megatrons_tests(test, golden, points, attention):
    row = {"golden": f"golden_values_{golden}.json", "n_points": points}
    assert read_megatron(defaultdict(str, {**ROW, "test_case": test, **row}), 1).shape.attention == attention


ROW = {"platform": "h100", "num-layers": "12", "hidden-size": "512", "num-attention-heads": "8", "bf16": "true"}


def test_sequences_that_are_divided_have_fused_attention_and_no_dropout():
    run = megatron_row("gpt/gpt3_mcore_te_tp2_pp1_cp2_1node", context_parallel_size="2")
    assert (run.cp, run.dp, run.shape.attention, run.shape.dropout) == (2, 4, "flash", 0.0)


def test_families_of_tests_have_their_experts():
    cells = {"num_experts": "8", "expert_model_parallel_size": "8", "tensor_model_parallel_size": "2"}
    run = megatron_row("moe/gpt3_moe_mcore_te_ep8_resume_torch_dist", **cells)
    assert (run.shape.experts, run.shape.top_k, run.shape.expert_ffn, run.shape.bias) == (8, 2, 1024, False)
    assert (run.ep, run.etp) == (8, 2)
    assert megatron_row("moe/x_etp1_ep8", **cells).etp == 1
    deepseek = next(run for run in TABLES["megatron-memory"][0] if run.model.startswith("deepseekv3"))
    assert (deepseek.shape.latent, deepseek.shape.dense_layers, deepseek.shape.extra_heads) == (DEEPSEEK, 3, 1)
    assert (deepseek.gpus, deepseek.etp, deepseek.shape.vocab % 6464) == (64, 1, 0)
    uneven = next(run for run in TABLES["megatron-memory"][0] if "uneven" in run.model)
    assert uneven.stage_layers == (2, 4, 4, 2)
    t5 = megatron_row("t5/t5_mcore_tp1_pp1", **{"num_layers": "", "seq_length": "", "ffn_hidden_size": "3072"})
    assert (t5.shape.family, t5.shape.layers, t5.shape.seq_len, t5.shape.decoder_len) == ("t5", 12, 512, 128)


# -- models ------------------------------------------------------------------------------------------------------------

SMALL = Shape(layers=3, hidden=64, heads=4, kv_heads=4, head_size=16, ffn=256, vocab=256, seq_len=32)
LLAMA = replace(SMALL, kv_heads=2, ffn=96, gated=True, norm="rms", positions="rope", bias=False, tied=False)
MOE = replace(LLAMA, experts=4, top_k=2, expert_ffn=32, shared_ffn=64, dense_layers=1)
MODELS = {
    "gpt": SMALL,
    "gpt unfused": replace(SMALL, attention="unfused", dropout=0.1, attention_dropout=0.1),
    "llama": LLAMA,
    "llama spelled out": replace(LLAMA, fused=False, joined=False),
    "experts": MOE,
    "experts unfused": replace(MOE, attention="unfused"),
    "latent": replace(MOE, latent=DEEPSEEK._replace(query_rank=24, kv_rank=16), qk_norm=True, extra_heads=1),
    "bert": replace(SMALL, family="bert", attention="unfused"),
    "t5": replace(SMALL, family="t5", attention="unfused", decoder_len=16),
}


def run_with(shape: Shape) -> Run:
    return replace(run_of(dp="1", tp="1", num_gpus="1", dtype="bf16"), shape=shape, gpus=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.matrix
def test_models_are_captured_with_blocks_alike_and_divided(name):
    shape = MODELS[name]
    profile = capture(workload(run_with(shape)))
    blocks = [call.kind for call in profile.calls if re.match(r"(layers|encoder|decoder)\.\d+$", call.name)]
    kinds = {"t5": 2}.get(shape.family, 1) + (shape.dense_layers > 0)
    assert len(blocks) == shape.layers * (2 if shape.family == "t5" else 1)
    assert len(set(blocks)) <= kinds + 1  # the first differs by what is on its way to it
    assert profile.divided_share(2) > 0.9
    if shape.family == "decoder" and not shape.latent:
        ours = sum(p.bytes for p in profile.parameters.values()) / 2
        assert ours == pytest.approx(shape.parameters, rel=0.03)


@pytest.mark.parametrize("name", ["gpt", "gpt unfused", "llama", "llama spelled out", "experts"])
def test_captured_operations_do_the_floating_point_operations_that_are_counted(name):
    shape = MODELS[name] if "experts" not in name else replace(MOE, dense_layers=0)
    profile = capture(workload(run_with(shape)))
    forward = sum(op.flops.at(4) for call in profile.calls for op in call.forward)
    router = 2 * shape.seq_len * shape.layers * shape.hidden * shape.experts
    assert 3 * (forward / 4 - router) == pytest.approx(model_flops(shape), rel=1e-6)


def test_fused_kernels_do_what_operators_do():
    torch.manual_seed(0)
    shape = replace(LLAMA, joined=False)
    one, two = (FAMILIES["decoder"](replace(shape, fused=fused)).double() for fused in (True, False))
    two.load_state_dict(one.state_dict())
    tokens = torch.randint(shape.vocab, (2, shape.seq_len))
    # Rotary tables are float32 and so is a fused norm inside; the loss is float32 as well.
    losses = [loss_of(shape, "plain")(model, tokens) for model in (one, two)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm(), name


@pytest.mark.parametrize("name", MODELS)
def test_models_run_for_real_and_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    shape = MODELS[name]
    model = FAMILIES[shape.family](shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    loss = loss_of(shape, "plain")(model, torch.randint(shape.vocab, (4, shape.seq_len + shape.decoder_len)))
    loss.backward()
    assert loss.isfinite()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_experts_that_are_all_alike_are_one_mlp_weighed_by_the_router():
    torch.manual_seed(0)
    layer = Experts(MOE).double()
    for weights in (layer.ups, layer.downs):
        torch.nn.init.normal_(weights[0], std=0.1)
        weights.data.copy_(weights[0].expand_as(weights))
    x = torch.randn(2, 32, 64, dtype=torch.float64)
    gates, ups = (x @ layer.ups[0]).chunk(2, -1)
    share = torch.softmax(layer.router(x).float(), -1).topk(2, -1).values.sum(-1, keepdim=True).double()
    expected = share * ((torch.nn.functional.silu(gates) * ups) @ layer.downs[0])
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-9)


def test_dropout_drops_its_share_and_passes_the_gradient_of_the_rest():
    torch.manual_seed(0)
    x, residual = torch.randn(100, 100, requires_grad=True), torch.randn(100, 100, requires_grad=True)
    out = dropout_add(x, residual, 0.25)
    kept = out != residual
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(out[kept], (residual + x / 0.75)[kept])
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert (residual.grad == 1).all()
    assert dropout(x, 0.0) is x
    assert (dropout(x, 0.25) == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_activations_and_weights_are_in_the_runs_dtype():
    profile = capture(workload(replace(run_with(SMALL), dtype="fp16")))
    products = {op.dtype for call in profile.calls for op in call.forward if op.kind == "matmul"}
    assert products == {"float16"}
    assert {op.dtype for op in profile.calls[-1].forward} == {"float32"}
    assert profile.calls[-1].name == LOSS


# -- figures -----------------------------------------------------------------------------------------------------------


def test_kendalls_tau():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert kendall_tau([1, 1, 1], [1, 2, 3]) is None


def test_regret_is_of_the_first_choice():
    assert regret([2, 1, 3], [1.0, 1.2, 3.0]) == pytest.approx(0.2)
    assert regret([1, 2], [1.0, 0.5]) == 1.0
    assert regret([1, 1, 2], [1.0, 3.0, 5.0]) == 1.0  # two first choices


def test_summaries():
    base = replace(run_of(), peak_memory_bytes=None)
    measured, expected = [1.0, 2.0, 4.0], [1.1, 1.8, 4.0]
    rows = [
        Predicted(replace(base, row=i, step_time_s=m), Prediction(e, 2.0 * GIB))
        for i, (m, e) in enumerate(zip(measured, expected, strict=True))
    ]
    other = replace(base, source="other", step_time_s=None, peak_memory_bytes=1.0 * GIB)
    found = summaries([*rows, Predicted(other, Prediction(1.0, 1.5 * GIB))], [Skipped("other", 3, "x", "why")])
    assert [s.to_json() for s in found] == [
        {"source": base.source, "rows": 3, "skipped": 0, "time_mape": 6.6667, "time_median_ape": 10.0}
        | {"memory_mape": None, "memory_median_ape": None, "kendall_tau": 1.0, "regret": 0.0},
        {"source": "other", "rows": 1, "skipped": 1, "time_mape": None, "time_median_ape": None}
        | {"memory_mape": 50.0, "memory_median_ape": 50.0, "kendall_tau": None, "regret": None},
    ]


def test_questions_differ_by_model_batch_and_devices_but_not_by_plan():
    one = run_of()
    assert one.question == run_of(tp="2", dp="4", micro_batch="1", dtype="bf16").question
    for cells in ({"layers": "12"}, {"global_batch_seqs": "32"}, {"num_gpus": "4", "dp": "1"}, {"gpu": "H100"}):
        assert one.question != run_of(**cells).question


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_predicts_a_table_and_names_what_it_cannot(tmp_path: Path):
    rows = [
        training_row(layers="2", hidden="64", heads="4", source="here"),
        training_row(layers="2", hidden="64", heads="4", source="here", dp="8", tp="1", step_time_s="0.5"),
        training_row(layers="3", hidden="64", heads="4", source="here", gpu="Z9000"),
    ]
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "tokens_per_s_per_gpu"])
        writer.writeheader()
        writer.writerows(rows)
    command = [sys.executable, str(Path(published.__file__)), "--csv", str(table), "--kind", "training"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    (source,) = json.loads(done.stdout)["sources"]
    assert (source["source"], source["rows"], source["skipped"], source["memory_mape"]) == ("here", 2, 1, None)
    assert source["time_mape"] > 0
    assert source["kendall_tau"] is None
    assert source["regret"] is not None
    assert published.main([*command[2:], "--processes", "1", "--rows"]) == 0


def test_the_command_says_what_is_wrong_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert published.main(["--csv", str(tmp_path / "none.csv")]) == 2
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert published.main(["--csv", str(tmp_path / "other.csv")]) == 2
    assert "--kind" in capsys.readouterr().err


@pytest.mark.parametrize("ours", [entropy, fused_entropy])
def test_losses_of_frameworks_are_the_loss(ours):
    logits, labels = torch.randn(5, 3, 11, requires_grad=True), torch.randint(11, (5, 3))
    found, expected = ours(logits, labels), functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))
