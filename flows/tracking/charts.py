"""Which metrics of a run become charts in MLflow: about sixty, the same ones in every arm that has what they measure.

MLflow makes a chart for each metric and is slow with hundreds. What is left out here is said by another metric, or follows from
some, and stays in the artifacts' own records, which `cohort show`, the summary and the figures read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_LEFT_OUT: Final = re.compile(
    "|".join(
        [
            "policy/policy_loss",  # loss - beta * kl
            "policy/ratio_(mean|min)",  # 1 up to noise; the clipped share and the maximum say when not
            "policy/(outputs_computed|padding_share|trained_parameters)",
            "sft/padding_share",
            "reward/status_(ok|wrong)",  # the mean of the component that read the answer, and what is left of 1
            "reward/status_truncated",  # rollout/truncated_rate
            "reward/status_(timeout|error)",  # parts of reward/faults
            "reward/(missing|screened|failed)",  # parts of reward/frac_masked, and of reward/faults
            "rollout/(samples|tokens)",  # steps of progress/samples and progress/tokens
            "memory/tensors_mb",
            "eval/.*/no_verdict_rate",
            "eval/.*/greedy_accuracy_ci_(low|high)",
            r"eval/.*/(pass|maj)_at_\d+_ci_(low|high)",
            "rm/(auc_low|auc_high|cut_auc|length_auc|pair_accuracy|step_auc|pearson|rule_mean|rule_length|score_mean|score_length)",
            "rm/held_out_(accuracy|step_accuracy)/.*",
            "rm/held_out_auc/.*_old_policy",
        ]
    )
)
_AT_K: Final = re.compile(r"(.*/(?:pass|maj)_at_)(\d+)")
_HELD_OUT: Final = "rm/held_out_auc/"


def charted(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step that MLflow gets: of pass@k and maj@k that of the largest k.

    Of reward models on held-out outputs of the newest policy: the AUC of those that rewarded the iteration, and that of those
    after it, which are the same where none was trained: so every arm with reward models has both.
    """
    largest: dict[str, int] = {}
    for kind, k in (found.groups() for name in metrics if (found := _AT_K.fullmatch(name))):
        largest[kind] = max(int(k), largest.get(kind, 0))
    kept = {
        name: value for name, value in metrics.items() if not _LEFT_OUT.fullmatch(name) and _is_largest(name, largest)
    }
    if kept.get("reward/model") == kept.get("reward/mean"):  # a model rewards alone
        kept.pop("reward/model", None)
    return kept | _ageing(metrics)


def _is_largest(name: str, largest: Mapping[str, int]) -> bool:
    found = _AT_K.fullmatch(name)
    return found is None or int(found[2]) == largest[found[1]]


def _ageing(metrics: Mapping[str, float]) -> dict[str, float]:
    """Where a measure is left out for being another one's, that one's: models not trained, a policy that has not moved."""
    before = metrics.get(f"{_HELD_OUT}old_model_new_policy", metrics.get(f"{_HELD_OUT}old_model_old_policy"))
    if before is None:
        return {}
    after = metrics.get(f"{_HELD_OUT}new_model_new_policy", before)
    return {f"{_HELD_OUT}old_model_new_policy": before, f"{_HELD_OUT}new_model_new_policy": after}
