"""One of two ranks, as a process of its own: what `test_ranks` starts. Usage: python rank_process.py FOLDER RANK.

It trains under each ZeRO stage, publishes after every update to the store in FOLDER, and reports into FOLDER/rank<RANK>.json.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

RANKS = 2
STAGES = (0, 1, 2, 3)
SPLITS = ((5, 2), (2, 5), (7, 0))
"""Rows of rank 0 and of rank 1 in each update; together always the same seven."""
MAX_TOKENS = 20
BUSIEST = 7
"""At least as many micro-batches as any rank has: one a row."""


def config(stage: int | None, precision: str = "fp32", **changes: Any) -> Any:
    """How both sides of the comparison train: DeepSpeed at a ZeRO stage, or plain torch."""
    from stages.training import AdamWConfig, DeepSpeedEngineConfig, TorchEngineConfig, TrainingConfig

    return TrainingConfig(
        engine=TorchEngineConfig() if stage is None else DeepSpeedEngineConfig(zero_stage=stage, ranks=RANKS),
        optimizer=AdamWConfig(learning_rate=1e-3),
        precision=precision,
        max_grad_norm=1.0,
        warmup_steps=4,
        threads=1,
        **changes,
    )


NAMES = ("loss", "kl", "ratio_mean", "ratio_max", "ratio_min", "padding_share", "entropy", "grad_norm")
FRUGAL: dict[str, Any] = {"max_logits": 8 * 26, "activation_checkpointing": True}
"""Logits of more than 8 positions in chunks: those of some micro-batches, which one rank may have and the other not."""


def half_configs(stage: int | None) -> dict[str, Any]:
    """In bfloat16, of all weights and of an adapter."""
    from stages.training import LoRAConfig

    adapters = {"all": None} | ({"adapter": LoRAConfig(r=4)} if importlib.util.find_spec("peft") else {})
    return {name: config(stage, "bf16", adapter=adapter, **FRUGAL) for name, adapter in adapters.items()}


def accumulate_share(engine: Any, split: tuple[int, int], *, weight: float = 1.0) -> None:
    """This rank's part of the mean negative log-likelihood of all seven rows, in as many passes as every other rank."""
    from stages.training.batching import micro_batches
    from stages.training.forward import completion_logprobs
    from tests.stages.training.tiny import random_rows

    rows = random_rows(7)
    targets = sum(len(row.output_ids) for row in rows)
    own = rows[: split[0]] if engine.rank == 0 else rows[split[0] :]
    passes: list[tuple[Any, float]] = [(batch, weight) for batch in micro_batches(own, MAX_TOKENS)]
    passes += [(next(micro_batches(rows, 1)), 0.0)] * (BUSIEST - len(passes))
    for number, (batch, factor) in enumerate(passes):
        scored = completion_logprobs(engine.model, batch)
        engine.backward(-factor * scored.logp_BO.sum() / targets, last=number == BUSIEST - 1)


def train(engine: Any) -> dict[str, Any]:
    """Three updates, then one that only rank 1 makes NaN."""
    from stages.training.loop import publish

    found: dict[str, Any] = {"place": [engine.rank, engine.world_size], "total": engine.total(engine.rank + 0.25)}
    found["updates"] = []
    for split in SPLITS:
        accumulate_share(engine, split)
        report = engine.step()
        found["updates"].append({"norm": report.grad_norm, "skipped": report.skipped, "digest": publish(engine).digest})
    accumulate_share(engine, SPLITS[0], weight=math.nan if engine.rank == 1 else 1.0)
    report = engine.step()
    found["nan"] = {"skipped": report.skipped, "finite": math.isfinite(report.grad_norm), "count": engine.skipped}
    published = publish(engine, optimizer=False)
    found["nan"]["digest"] = published.digest
    return found


def finetune(engine: Any) -> dict[str, float]:
    """One supervised update of all seven rows, of whose micro-batches each rank computes its share."""
    from stages.sft import SFTConfig
    from stages.sft.stage import Curve, parts_of, sft_loss
    from stages.training.loop import train
    from tests.stages.training.tiny import random_rows

    settings = SFTConfig(micro_batch_tokens=MAX_TOKENS)
    parts = parts_of(random_rows(7), engine, settings, Curve(settings))
    (step,) = train(engine, [(parts, 1.0)], lambda part: sft_loss(engine, part))
    return {"loss": engine.total(step.loss), "norm": step.grad_norm}


def improve(engine: Any) -> dict[str, Any]:
    """Three GRPO updates on one exploration (mu = 3), of whose micro-batches each rank computes its share."""
    from stages.training.loop import optimizer_step, publish
    from stages.update import GRPOConfig, UpdateConfig
    from stages.update.loss import MiniBatch, policy_loss
    from stages.update.metrics import UpdateMetrics
    from stages.update.objectives import method_of
    from tests.stages.update.exact import policy_model
    from tests.stages.update.test_coefficients import examples

    config = UpdateConfig(objective=GRPOConfig(beta=0.5), mu=3, micro_batch_tokens=MAX_TOKENS)
    method, noted = method_of(config.objective), UpdateMetrics()
    mini_batch = MiniBatch.of(examples("tokens"), engine, 1.0, config, method)
    mini_batch.compare_with(policy_model(1).float(), engine)
    mini_batch.remember_policy(engine)
    for _ in range(config.mu):
        loss = policy_loss(engine, mini_batch.temperature, method, config.correction, noted.add)
        noted.stepped(optimizer_step(engine, mini_batch.parts, loss))
    noted.all_reduce(engine)
    metrics = noted.metrics(beta=0.5, seconds=1.0, computed=0)
    shown = {name: metrics[f"policy/{name}"] for name in NAMES}
    return {"metrics": shown, "digest": publish(engine).digest}


def score(engine: Any) -> dict[str, Any]:
    """Log-probabilities of all seven rows in bfloat16, on every rank, and the norm of the gradient of an update by shares."""
    import torch

    from stages.training.batching import collate
    from stages.training.forward import completion_logprobs
    from tests.stages.training.tiny import random_rows

    with torch.no_grad(), engine.autocast():
        batch = collate(random_rows(7), range(7))
        scored = completion_logprobs(engine.model, batch, max_logits=engine.max_logits)
    return {"logprobs": scored.logp_BO.tolist(), "norm": finetune(engine)["norm"]}


def gather(start: Any, folder: Path, *, half: bool, adapter: bool) -> dict[str, Any]:
    """Two updates under ZeRO 3 in bfloat16, of whose parameters none stays gathered: checkpoints, and what was sent.

    With `half` the weights are then handed over, once where there is no room and once into `folder`.
    """
    from deepspeed.runtime.zero import partition_parameters as zero

    from pipeline.store import StoreError
    from stages.training import LoRAConfig
    from stages.training import config as config_module
    from stages.training import engine as engine_module
    from stages.training.deepspeed_engine import DeepSpeedEngine
    from stages.training.hardware import live_tensors_mib
    from stages.training.loop import publish

    precision = "bf16" if adapter else "auto"
    config_module.has_native_bf16 = lambda: True  # what `auto` asks, on whatever machine this is
    alive: list[float] = []

    class Engine(DeepSpeedEngine):
        def _weights(self) -> Any:
            for named in super()._weights():
                if gc.get_freeze_count():
                    alive.append(live_tensors_mib())
                yield named

        def _settings(self) -> dict[str, Any]:
            settings = super()._settings()
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return settings

        def _gather_in_half(self, *given: Any) -> None:
            if half:
                super()._gather_in_half(*given)

    sent: dict[str, int] = {}
    send = zero._dist_allgather_fn

    def count(own: Any, *others: Any) -> Any:
        sent[str(own.dtype)] = sent.get(str(own.dtype), 0) + own.numel()
        return send(own, *others)

    zero._dist_allgather_fn = count
    try:
        engine = Engine(
            start, config(3, adapter=LoRAConfig(r=3) if adapter else None).override({"precision": precision})
        )
        digests, norms = [], []
        for split in SPLITS[:2]:
            with engine.autocast():
                accumulate_share(engine, split)
            norms.append(engine.step().grad_norm)
            digests.append(publish(engine).digest)
    finally:
        zero._dist_allgather_fn = send
    found: dict[str, Any] = {"digests": digests, "norms": norms, "sent": sent}
    if not half:
        engine.close()
        return found
    free_bytes = engine_module.free_bytes
    engine_module.free_bytes = lambda place: 0
    try:
        engine.hand_over(digests[-1], folder, half=True)
    except StoreError:
        found["ranks without room"] = engine.total(1.0)
    finally:
        engine_module.free_bytes = free_bytes
    gc.freeze()  # what is there now is not counted, and so counting is fast
    engine.hand_over(digests[-1], folder, half=True)
    gc.unfreeze()
    found["grown"] = int(max(alive) * 2**20)
    engine.close()
    return found


def main(folder: Path, rank: int) -> None:
    """Join the group, train under every stage, report."""
    import torch

    from pipeline.store import Store, use_store
    from stages.models import Checkpoint
    from stages.training.deepspeed_engine import DeepSpeedEngine
    from stages.training.torch_engine import TorchEngine

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found: dict[str, Any] = {}
    with use_store(Store(folder / "store")):
        start = Checkpoint((folder / "start").read_text())
        try:
            TorchEngine(start, config(None))
        except ValueError as error:
            found["torch"] = str(error)
        for stage in STAGES:
            engine = DeepSpeedEngine(start, config(stage))
            found[str(stage)] = train(engine)
            engine.load(start)
            found[str(stage)]["sft"] = finetune(engine)
            engine.close()
            engine = DeepSpeedEngine(start, config(stage, **FRUGAL))
            found[str(stage)]["grpo"] = improve(engine)
            engine.close()
            for name, how in half_configs(stage).items():
                engine = DeepSpeedEngine(start, how)
                found[str(stage)][name] = score(engine)
                engine.close()
        for adapter in (False, True) if importlib.util.find_spec("peft") else (False,):
            place = folder / f"handed {adapter}"
            place.mkdir(exist_ok=True)
            found[f"gathers {adapter}"] = [gather(start, place, half=half, adapter=adapter) for half in (True, False)]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
