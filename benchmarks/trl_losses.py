"""TRL's losses and gradients on given rows, in the environment of its own, for `tests/benchmarks/test_trl_parity.py`.

    python -m benchmarks.trl_losses WORKLOAD.json KINDS.json ROWS.safetensors FOUND.safetensors

KINDS: name -> {"settings": arguments of `GRPOConfig`, "old": whether the rows' own log pi_old is used}. ROWS: `prompt_ids`
(padded on the left), `completion_ids` (on the right), their masks, `advantages`, `old_logps`, `ref_logps`. FOUND: of each kind
`NAME/loss` and `NAME/gradient` (all parameters in the order of their names).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.trl_worker import make_trainer
from benchmarks.workload import Workload


def main() -> None:
    from safetensors.torch import load_file, save_file
    from transformers import TrainerCallback

    workload = Workload.load(sys.argv[1])
    rows, found = load_file(sys.argv[3]), {}
    for name, kind in json.loads(Path(sys.argv[2]).read_text()).items():
        trainer = make_trainer(workload, "eager", len(rows["advantages"]), TrainerCallback(), **kind["settings"])
        found[f"{name}/loss"], found[f"{name}/gradient"] = _loss(trainer, rows, own_old=kind["old"])
    save_file(found, sys.argv[4])


def _loss(trainer: Any, rows: dict[str, Any], *, own_old: bool) -> tuple[Any, Any]:
    import torch

    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": rows["prompt_ids"],
        "prompt_mask": rows["prompt_mask"],
        "completion_ids": rows["completion_ids"],
        "completion_mask": rows["completion_mask"],
        "advantages": rows["advantages"],
        "ref_per_token_logps": rows["ref_logps"],
        "num_items_in_batch": rows["completion_mask"].sum(),
    }
    if own_old:
        inputs["old_per_token_logps"] = rows["old_logps"]
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = [parameter.grad.flatten() for _, parameter in sorted(trainer.model.named_parameters())]
    return loss.detach().reshape(1), torch.cat(gradients)


if __name__ == "__main__":
    main()
