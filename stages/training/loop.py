"""Give a stage an engine for its checkpoint, make optimizer steps, publish a checkpoint, score rows.

The loss of a micro-batch is divided by the count of the whole mini-batch, over all micro-batches and ranks, so that gradients
add up.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, assert_never

import torch
from torch import Tensor

from pipeline.orchestration.interruption import check
from pipeline.residency import evict, kept, resident
from pipeline.store import current_store
from pipeline.store.context import payloads
from stages.models import Checkpoint, architecture_of
from stages.models.folders import ADAPTER, ADAPTER_SETTINGS, FACTORS, OPTIMIZER, TRAINER, WEIGHTS
from stages.training.adapters import load_trainable
from stages.training.batching import Batch, Row, micro_batches, own_share
from stages.training.config import DeepSpeedEngineConfig, TorchEngineConfig, TrainingConfig
from stages.training.engine import Engine, StepReport
from stages.training.optimizers import rounded_by_autocast
from stages.training.writer import writer

Part = TypeVar("Part")

_TRAINED: Final = (WEIGHTS, OPTIMIZER, TRAINER, *(f"{ADAPTER}/{name}" for name in (ADAPTER_SETTINGS, FACTORS)))
"""The files of a checkpoint that training changes."""


def resident_engine(checkpoint: Checkpoint, config: TrainingConfig, slot: str = "trainer") -> Engine:
    """Return the engine kept in `slot`, holding exactly `checkpoint`; load only when it holds something else."""
    key = _engine_key(checkpoint, config)
    there = kept(slot, key)
    if there is None or there.holds != checkpoint.state:
        # Before the slot is made free: what was not written is written by whoever has it, or replayed.
        checkpoint.path  # noqa: B018
    engine = resident(slot, key, lambda: _make_engine(checkpoint, config))
    if engine.holds != checkpoint.state or config.optimizer_state == "none":
        engine.load(checkpoint)
    return engine


def _engine_key(checkpoint: Checkpoint, config: TrainingConfig) -> tuple[Any, ...]:
    return json.dumps(config.key(), sort_keys=True), config.max_skipped_steps, architecture_of(checkpoint)


def _make_engine(checkpoint: Checkpoint, config: TrainingConfig) -> Engine:
    match config.engine:
        case TorchEngineConfig():
            from stages.training.torch_engine import TorchEngine

            return TorchEngine(checkpoint, config)
        case DeepSpeedEngineConfig():
            from stages.training.deepspeed_engine import DeepSpeedEngine

            return DeepSpeedEngine(checkpoint, config)
        case _ as unknown:
            assert_never(unknown)


@contextlib.contextmanager
def reference_for_pass(
    reference: Checkpoint, config: TrainingConfig, device: str, *, place: str = "cpu"
) -> Iterator[torch.nn.Module]:
    """Yield pi_ref on a device, to compute without gradient in the block.

    Where the resident trainer has an adapter on the same base, it is the trainer's model with the reference's factors in place
    of its own: megabytes, not a second model. Both have equal bits on a CPU. Else `reference_model`.

    Args:
        place: where a model of its own is kept between passes.
    """
    engine = kept("trainer", _engine_key(reference, config)) if config.adapter is not None else None
    exchanged = getattr(engine, "as_reference", lambda _: None)(reference)
    if exchanged is not None:
        evict("reference")
        with exchanged:
            yield engine.model  # type: ignore[union-attr]
        return
    model = reference_model(reference, config, place)
    with on_device(model, device):
        yield model


def reference_model(reference: Checkpoint, config: TrainingConfig, place: str) -> torch.nn.Module:
    """Return pi_ref, frozen and kept for as long as it is the reference, in host memory (`cpu`) or on a device.

    Its weights are float32; under bfloat16 those of linear layers are what autocast makes of an engine's. In host memory they
    are pinned where there is a GPU, to which `on_device` moves them for a pass.

    An adapted policy is computed as the engine computes its own (W x + s B A x). The base under a disabled adapter would be the
    policy before any training, and the rounding of merged weights a KL above 0.
    """

    def load() -> torch.nn.Module:
        model: torch.nn.Module = load_trainable(reference, config, torch.float32)[0]
        model.requires_grad_(False)
        if config.bf16:
            halve_linear_weights(model)
        if place == "cpu" and torch.cuda.is_available():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.pin_memory()
        return model.to(place)

    kind = (config.bf16, config.float32_logits, config.attention_kind, config.share_prompts, config.adapter)
    return resident("reference", (reference.state, place, *kind), load)


def halve_linear_weights(model: torch.nn.Module, *, spared: Collection[torch.nn.Module] = ()) -> None:
    """Keep the weights of linear layers of a frozen model in bfloat16, to which autocast casts them in every pass.

    The products have the same bits. Embeddings, weights that are tied to one, norms and biases stay float32.

    Args:
        spared: layers that compute outside of autocast.
    """
    for weight in rounded_by_autocast(model, spared):
        weight.data = weight.data.to(torch.bfloat16)


@contextlib.contextmanager
def on_device(model: torch.nn.Module, device: str) -> Iterator[None]:
    """Have a frozen model on a device inside the block, and afterwards in the memory where it was: nothing is copied back."""
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    places = [
        (table, name, tensor, tensor.data) for table in tables for name, tensor in table.items() if tensor is not None
    ]
    try:
        model.to(device, non_blocking=True)
        yield
    finally:
        for table, name, tensor, data in places:
            tensor.data, table[name] = data, tensor  # `to` moves the data of a tensor, or puts another in its place


def train(
    engine: Engine,
    steps: Iterable[tuple[Sequence[Part], float]],
    loss: Callable[[Part], Tensor],
    *,
    before_step: Callable[[], None] | None = None,
) -> Iterator[StepReport]:
    """Make optimizer steps and yield what each did.

    Args:
        steps: for each step this rank's micro-batches and the factor of its learning rate. Read one at a time: a generator may
            decide what comes next by what the caller made of the steps before.
        loss, before_step: as `optimizer_step`.

    Raises:
        GradientError: more steps in a row were skipped than `TrainingConfig.max_skipped_steps` allows.
    """
    for parts, factor in steps:
        yield optimizer_step(engine, parts, loss, factor=factor, before_step=before_step)


def optimizer_step(
    engine: Engine,
    parts: Sequence[Part],
    loss: Callable[[Part], Tensor],
    *,
    factor: float = 1.0,
    before_step: Callable[[], None] | None = None,
) -> StepReport:
    """Accumulate the gradients of a mini-batch and step; `loss` of the report is this rank's share, before the step.

    Args:
        parts: this rank's micro-batches. None: there is nothing to learn from, no step is made, and it counts as skipped.
        loss: forward and loss of a micro-batch, with gradient.
        factor: of the scheduled learning rate.
        before_step: called once gradients are accumulated; what it raises keeps the step from being made.
    """
    losses: list[Tensor] = []
    for number, part in enumerate(parts, start=1):
        share = loss(part)
        engine.backward(share, last=number == len(parts))
        losses.append(share.detach())
    if not parts:
        return StepReport(grad_norm=0.0, learning_rate=0.0, skipped=True)
    if before_step is not None:
        before_step()
    report = engine.step(factor=factor)
    return report._replace(loss=sum(share.item() for share in losses))


def publish(
    engine: Engine,
    *,
    given: Checkpoint | None = None,
    optimizer: bool = True,
    files: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Publish what the engine has as the result of the running stage call, which it then holds; rank 0 writes it.

    Where payloads are not to be written now (`writing_payloads`), only what describes the model is; the rest never, or from a
    copy while the next stage runs.

    Args:
        given: what training went on from; it is returned where no step was made.
        optimizer: with the optimizer's state.
        files: further text files of the checkpoint, by name.
    """

    def fill(folder: Path) -> None:
        engine.save(folder, optimizer=optimizer)
        for name, text in (files or {}).items():
            (folder / name).write_text(text)

    if given is not None and engine.holds == given.state:
        return given
    state, when = "", payloads() if optimizer and not files else "now"
    if when == "now":
        writer().wait()
        if engine.rank == 0:
            state = Checkpoint.write_derived(fill)
        else:
            engine.save(Path(), optimizer=optimizer)  # takes part in gathering, writes nothing
    elif engine.rank == 0:
        state = Checkpoint.write_description(engine.describe, _TRAINED)
    if when == "background":
        copy = engine.snapshot()
        if engine.rank == 0:
            writer().start(current_store(), Checkpoint.derived(state).digest, state, copy)
    if engine.world_size > 1:
        state = _digest_of_rank_zero(state, engine.device)
    checkpoint = Checkpoint.derived(state)
    # Without its optimizer state the checkpoint is less than the engine: the next stage call must start from the artifact.
    engine.hold(checkpoint, state if optimizer else None)
    return checkpoint


def _digest_of_rank_zero(digest: str, device: str) -> str:
    """Return `digest` of rank 0 on every rank, sent as bytes: collectives of objects unpickle what they receive."""
    sent = torch.zeros(32, dtype=torch.uint8, device=device)
    if digest:
        sent.copy_(torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))
    torch.distributed.broadcast(sent, src=0)
    return bytes(sent.tolist()).hex()


@torch.no_grad()
def score_rows(
    rows: Sequence[Row],
    max_tokens: int,
    model: torch.nn.Module,
    score: Callable[[Batch], Tensor],
    engine: Engine | None = None,
) -> list[list[float]]:
    """Return the values of `score` for each row, one per output token, in the order of `rows`.

    Ranks call it together; each computes a share of the micro-batches, and all get all values. Equal rows (a sampled group
    holds many) are computed once.

    Args:
        max_tokens: padded tokens of a micro-batch.
        model: what `score` computes with.
        score: values of a micro-batch in the layout [B, O] of its output mask.
        engine: whose ranks share the work; None: those of this process's group, where it is in one.
    """
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault((tuple(row.prompt_ids), tuple(row.output_ids)), []).append(index)
    distinct = [Row(*ids) for ids in places]
    place = place_among_ranks() if engine is None else (engine.rank, engine.world_size)
    batches = list(micro_batches(distinct, max_tokens, model=model))
    scored = _score_distinct(distinct, own_share(batches, rank=place[0], world_size=place[1]), score, place[1])
    found: list[list[float]] = [[] for _ in rows]
    for row, equal, values in zip(distinct, places.values(), scored, strict=True):
        for index in equal:
            found[index] = values[: len(row.output_ids)]
    return found


def _score_distinct(
    rows: Sequence[Row], share: Iterable[tuple[Batch, float]], score: Callable[[Batch], Tensor], world_size: int
) -> list[list[float]]:
    """Return values by row, padded to the longest output."""
    if not rows:
        return []
    longest = max(len(row.output_ids) for row in rows)
    table: Tensor | None = None
    for batch, factor in share:
        check()
        values_BO = score(batch)
        table = values_BO.new_zeros(len(rows), longest) if table is None else table
        if factor:
            table[list(batch.rows), : values_BO.shape[1]] = values_BO
    assert table is not None
    if world_size > 1:
        torch.distributed.all_reduce(table)  # of each row one rank's values and the others' zeros: nothing is rounded
    listed: list[list[float]] = table.tolist()
    return listed


def place_among_ranks() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
