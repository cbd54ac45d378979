"""`cohort plan`: memory, time and disk of a run before it is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from flows.commands.options import ConfigFiles, Method, Root, Settings, console
from flows.places import Places

__all__ = ["plan"]


def plan(
    recipe: str,
    *,
    config: ConfigFiles = None,
    set_: Settings = None,
    method: Method = None,
    device: str | None = None,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    nodes: int | None = None,
    model_config: Path | None = None,
    mean_output_tokens: float | None = None,
    prompt_tokens: float | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    root: Root = None,
) -> int:
    """Say what a run needs before it begins: memory by stage, whether it fits and what to change, time, disk, what is there.

    From the configuration and the model's config.json; no weights are loaded and nothing is computed. Exit code 0 when it
    fits, 1 when it does not. Every assumption is printed.

    Parameters
    ----------
    recipe
        Name of a recipe (`cohort recipes`) or a YAML file.
    config
        YAML file of overrides.
    set_
        `key=value`.
    method
        A method (`cohort methods`) instead of the recipe's.
    device
        Whose rates: `a100-80g`, `h100-80g`, `h200-141g`, `cpu`, or a file; default: what `cohort doctor --bench` measured here.
    gpus
        GPUs of a host that train together (ranks of every DeepSpeed engine).
    gpu_memory
        Of one GPU, GiB.
    nodes
        Hosts.
    model_config
        A model's config.json (or its folder), where the recipe's own model is not here.
    mean_output_tokens
        Mean length of outputs; default: as in the last run of the recipe, else half of `rollout.max_output_tokens`.
    prompt_tokens
        Length of prompts; default: as in the last run.
    json
        One JSON object (bytes, seconds, FLOPs) instead of tables.
    root
        Folder of store, runs and databases.
    """
    from flows.config.resolve import choose
    from flows.planning.plan import plan_of
    from flows.planning.request import Request, subject_of
    from flows.planning.view import as_json, print_plan

    chosen = choose(recipe, config or [], set_ or [], method=method).config
    request = Request(device, gpus, gpu_memory, nodes, model_config, prompt_tokens, mean_output_tokens)
    subject = subject_of(chosen, Places.under(root), request)
    made = plan_of(subject.given)
    if json:
        print(as_json(made, subject))
    else:
        print_plan(made, subject, console())
    return 1 if made.missing > 0 else 0
