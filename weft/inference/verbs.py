"""The verb ``generate`` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weft import options
from weft.fixed import takes_fixed
from weft.inference.sampling import Sampling
from weft.quantity import parse_sizes
from weft.report.output import output


@takes_fixed
def generate(
    target: options.TargetText,
    arguments: options.Arguments = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="may be given several times")] = None,
    prompt_tokens: Annotated[list[str] | None, typer.Option(metavar="N,N,...", help="a prompt as token ids")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="draw tokens; else take the most probable")] = False,
    temperature: Annotated[float, typer.Option(help="lower is less random")] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw from so many tokens; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from this share of the probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws; the same tokens under every plan")] = 0,
    plan_file: options.PlanFile = None,
    cluster: options.ClusterText = None,
    devices: options.Devices = None,
    memory: options.Memory = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="weights that training saved")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="a tokenizer of transformers")] = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    *,
    fixed: dict[str, Any],
) -> None:
    """Text after a prompt, by a model of transformers that is divided over devices."""
    from weft.jobs import generate as generating
    from weft.serving.tokenizer import tokenizer_of

    with output(as_json) as show:
        work = options.target_of(target, arguments)
        words = tokenizer_of(work, tokenizer)
        prompts = generating.prompts_of(words, prompt or (), prompt_tokens or ())
        sampling = Sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        plan = None if plan_file is None else options.plan_of(plan_file, fixed)
        if plan is None:
            plan = generating.planned(
                work,
                options.cluster_of(cluster, options.devices_of(devices), memory),
                prompt=max(map(len, prompts)),
                new_tokens=max_new_tokens,
                sequences=len(prompts),
                **fixed,
            )
        else:
            options.devices_of(devices, plan)
        order = generating.Order(
            plan=plan,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stops=words.ends,
            checkpoint=None if checkpoint is None else str(checkpoint),
            tokenizer=tokenizer,
            streams=len(prompts) == 1 and not as_json,
            memory_bytes=parse_sizes(memory),
        )
        found = generating.run(work, order)
        several = "\n".join(f"{text!r}:\n{found.texts[i]}\n" for i, text in enumerate(prompt or prompt_tokens or ()))
        show("" if order.streams else several, found.to_json())
