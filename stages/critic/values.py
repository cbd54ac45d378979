"""What the critic expects before each token: outputs in, values out."""

from __future__ import annotations

import math
import time

from pipeline.stage import record_metrics, stage
from stages.critic.config import CriticConfig
from stages.models import Checkpoint
from stages.tables import Rollouts, Values
from stages.training.ranks import on_ranks

__all__ = ["estimate_values"]


@stage(version="1")
@on_ranks
def estimate_values(critic: Checkpoint, outputs: Rollouts, config: CriticConfig) -> Values:
    """V(q, o_<t): the value before every output token, in the order of `outputs`.

    Raises:
        ValueError: a value that is not finite, by its row.
    """
    from torch import Tensor

    from stages.critic.forward import values_before
    from stages.training import threads
    from stages.training.batching import Batch, Row
    from stages.training.engine import resident_engine
    from stages.training.scoring import score_rows

    started = time.perf_counter()
    table = outputs.read().select(["question_id", "sample", "prompt_ids", "output_ids"]).to_pylist()
    rows = [Row(row["prompt_ids"], row["output_ids"]) for row in table]
    with threads(config.training.threads):
        engine = resident_engine(critic, config.training, slot="critic")

        def score(batch: Batch) -> Tensor:
            with engine.autocast():
                return values_before(engine.model, batch.to(engine.device))

        value = score_rows(rows, config.micro_batch_tokens, score, engine)
    for row, values in zip(table, value, strict=True):
        if not all(map(math.isfinite, values)):
            key = (row["question_id"], row["sample"])
            raise ValueError(f"critic {critic}: a value of output {key} is not finite; continue from an earlier critic")
    record_metrics({"time/values": time.perf_counter() - started})
    return Values.write(
        [
            {"question_id": row["question_id"], "sample": row["sample"], "value": values}
            for row, values in zip(table, value, strict=True)
        ]
    )
