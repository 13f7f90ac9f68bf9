import pytest
import transformers
from torch import nn

from examples.code_lm import CodeLM
from weft.capture.units import find_units
from weft.errors import ModelError


class Wrapper(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class Stage(Wrapper):
    pass


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def test_blocks_of_the_example() -> None:
    units = find_units(CodeLM(layers=3, hidden=16, heads=2, context=8))
    assert units == ["token", "position", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]


def test_layers_of_a_plain_mlp() -> None:
    assert find_units(mlp()) == ["0", "2", "4"]
    assert find_units(Wrapper(net=Wrapper(layers=mlp()))) == ["net.layers.0", "net.layers.2", "net.layers.4"]


def test_a_sequential_inside_a_repeated_block_stays_in_it() -> None:
    model = nn.ModuleList(Wrapper(mlp=mlp(), norm=nn.LayerNorm(4)) for _ in range(2))
    assert find_units(Wrapper(blocks=model)) == ["blocks.0", "blocks.1"]


def test_stages_are_opened_and_experts_are_not() -> None:
    def stage(width: int) -> nn.Module:
        return Stage(blocks=nn.Sequential(*(Wrapper(conv=nn.Conv2d(width, width, 3)) for _ in range(2))))

    units = find_units(Wrapper(stages=nn.ModuleList([stage(4), stage(8)])))
    assert units == ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"]
    experts = (Wrapper(experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3))) for _ in range(2))
    assert find_units(Wrapper(layers=nn.ModuleList(experts))) == ["layers.0", "layers.1"]


def test_modules_without_parameters_and_second_names_are_left_out() -> None:
    shared = nn.Linear(4, 4)
    assert find_units(Wrapper(a=shared, drop=nn.Dropout(), b=shared, scale=nn.ParameterList([shared.bias]))) == ["a"]


def test_encoder_and_decoder_are_opened() -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=32)
    units = find_units(transformers.T5ForConditionalGeneration(config))
    assert {"encoder.block.1", "decoder.block.0", "decoder.final_layer_norm", "lm_head"} <= set(units)
    assert not any(a != b and b.startswith(f"{a}.") for a in units for b in units)


def test_wanted_names_are_checked() -> None:
    model = CodeLM(layers=2, hidden=16, heads=2, context=8)
    assert find_units(model, ["norm", "blocks"]) == ["blocks", "norm"]
    with pytest.raises(ModelError, match=r"'block\.0', which is no module of CodeLM; did you mean 'blocks\.0'"):
        find_units(model, ["block.0"])
    with pytest.raises(ModelError, match=r"both 'blocks' and 'blocks\.0\.mlp'"):
        find_units(model, ["blocks", "blocks.0.mlp"])
    with pytest.raises(ModelError, match="twice"):
        find_units(model, ["norm", "norm"])
    with pytest.raises(ModelError, match=r"units=\['norm'\]"):
        find_units(model, "norm")
