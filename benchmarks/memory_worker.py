"""One side of the memory benchmark: a small update, then the one that is measured.

    python -m benchmarks.memory_worker WORK.json one-token|cohort|cohort-full|naive|trl

The last line on standard output is a JSON object: peak of the measured update and memory before it, in MiB above what this
process had after an update of a tiny model, with all libraries loaded; parameters; seconds. `trl` runs in the peers'
environment and takes nothing of Cohort but the clock on memory.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.memory_work import MemoryWork

if TYPE_CHECKING:
    from torch import Tensor

Update = Callable[[int, int], None]
"""One update on rows of so many prompt and output tokens."""
_WARM = (4, 12)


def main() -> None:
    work, side = MemoryWork.load(sys.argv[1]), sys.argv[2]
    # Whatever a library prints goes to standard error; standard output carries the answer.
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(work.threads)
    begin = _trl if side == "trl" else _cohort
    peak_memory = _clock().peak_memory
    begin(work.tiny(), side)[0](*_WARM)
    gc.collect()
    with peak_memory() as libraries:
        pass
    update, parameters = begin(work, side)
    update(*_WARM)
    with peak_memory() as before:
        pass
    started = time.perf_counter()
    with peak_memory() as peak:
        update(work.prompt, work.output)
    found = {
        "peak_mib": peak.mib - libraries.mib,
        "before_mib": before.mib - libraries.mib,
        "parameters": parameters,
        "seconds": time.perf_counter() - started,
    }
    answer.write(json.dumps(found) + "\n")


def _clock() -> Any:
    """`stages.training.hardware` by its file: in the peers' environment Cohort is not installed."""
    file = Path(__file__).parents[1] / "stages/training/hardware.py"
    spec = importlib.util.spec_from_file_location("memory_clock", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _cohort(work: MemoryWork, side: str) -> tuple[Update, int]:
    """Our engine; the sides differ in the loss alone. Returns the update and the number of parameters."""
    from pipeline.store import Store, use_store
    from stages.models import ExternalCheckpointConfig, import_checkpoint
    from stages.training import AdamWConfig, TrainingConfig
    from stages.training.torch_engine import TorchEngine

    settings: dict[str, Any] = {"attention": "sdpa", "activation_checkpointing": True, "precision": "fp32"}
    if side != "cohort":
        settings["max_logits"] = 1 if side == "one-token" else None
    config = TrainingConfig(optimizer=AdamWConfig(learning_rate=1e-6), **settings)
    with use_store(Store(Path(work.folder) / "store")):
        engine = TorchEngine(import_checkpoint(ExternalCheckpointConfig(path=work.policy)), config)

    def update(prompt: int, output: int) -> None:
        if side == "naive":
            engine.backward(_naive(engine.model, work.tokens(prompt, output)), last=True)
            engine.step()
        elif side == "one-token":
            # All tokens through the model, one of each row through its head: what an update costs but for its logits.
            _policy_update(engine, work, prompt + output - 1, 1)
        else:
            _policy_update(engine, work, prompt, output)

    return update, sum(parameter.numel() for parameter in engine.model.parameters())


def _policy_update(engine: Any, work: MemoryWork, prompt: int, output: int) -> None:
    """The update stage's own step: GRPO without a reference, mu = 1."""
    from stages.training.loop import optimizer_step
    from stages.update import GRPOConfig, UpdateConfig
    from stages.update.loss import Example, MiniBatch, policy_loss
    from stages.update.metrics import UpdateMetrics
    from stages.update.objectives import method_of

    config = UpdateConfig(objective=GRPOConfig(beta=0.0), micro_batch_tokens=work.rows * (work.prompt + work.output))
    examples = [
        Example("q", tuple(given), tuple(said), (float(1 - 2 * (number % 2)),) * output, 1.0, None, None)
        for number, (given, said) in enumerate(work.tokens(prompt, output))
    ]
    method, metrics = method_of(config.objective), UpdateMetrics()
    parts = MiniBatch.of(examples, engine, 1.0, config, method).parts
    optimizer_step(engine, parts, policy_loss(engine, 1.0, method, config.correction, metrics.add))


def _naive(model: Any, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """log softmax over all logits, then the tokens' own; with the entropy, as every side has it."""
    import torch

    ids_BT = torch.tensor([given + said for given, said in rows])
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    table_BTV = logits_BTV.float().log_softmax(-1)
    with torch.no_grad():
        entropy_BT = -(table_BTV.exp() * table_BTV).sum(-1)
    logp_BT = table_BTV.gather(-1, ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1)
    start = len(rows[0][0]) - 1
    ratio_BO = (logp_BT - logp_BT.detach())[:, start:].exp()
    sign_B1 = torch.tensor([[float(1 - 2 * (number % 2))] for number in range(len(rows))])
    assert entropy_BT.isfinite().all()
    return -(sign_B1 * ratio_BO).mean()


def _trl(work: MemoryWork, side: str) -> tuple[Update, int]:
    """TRL's trainer: its own loss, accelerator, clipping and optimizer, on rows that are given instead of sampled."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=f"{work.folder}/trl",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=work.rows,
        num_generations=work.rows,
        max_completion_length=work.output,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"},
    )
    data = Dataset.from_dict({"prompt": ["0"] * work.rows})
    trainer = GRPOTrainer(model=str(work.policy), reward_funcs=lambda **_: [], args=config, train_dataset=data)
    trainer.create_optimizer()
    model = trainer.accelerator.prepare_model(trainer.model)
    model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    model.train()
    optimizer = trainer.accelerator.prepare_optimizer(trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def update(prompt: int, output: int) -> None:
        rows = work.tokens(prompt, output)
        given, said = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
        inputs = {
            "prompt_ids": given,
            "prompt_mask": torch.ones_like(given),
            "completion_ids": said,
            "completion_mask": torch.ones_like(said),
            "advantages": torch.tensor([float(1 - 2 * (number % 2)) for number in range(len(rows))]),
            "num_items_in_batch": torch.tensor(float(said.numel())),
        }
        trainer.accelerator.backward(trainer.compute_loss(model, inputs))
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    return update, sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
