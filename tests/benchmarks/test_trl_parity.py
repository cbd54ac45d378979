"""Our losses and gradients against TRL's own, in float32, for every kind that both have; TRL runs in `.venv-bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.workload import Workload, make_policy
from stages.training.batching import Row, micro_batches
from stages.training.forward import completion_logprobs
from stages.update import UpdateConfig
from stages.update.loss import Example, MicroBatch, MiniBatch, micro_batch_terms
from stages.update.objectives import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    ObjectiveConfig,
    PPOConfig,
    method_of,
)

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-bench" / "bin" / "python"
TOLERANCE = 2e-6
"""Of the loss, and of each entry of the gradient, absolute; the gradients have norms of 0.1 to 10."""
LONGEST = 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="TRL is not installed: `make test-peers` makes .venv-bench"),
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One loss as both have it."""

    ours: ObjectiveConfig
    trl: dict[str, Any]
    """What differs from the step benchmark's settings, which are the paper's loss."""
    old: bool = True
    """Whether pi_old is another policy; else the ratio is 1."""
    temperature: float = 1.0


WIDE = {"epsilon": 0.2, "epsilon_high": 0.28}
KINDS = {
    "paper": Kind(GRPOConfig(), {}),
    "paper at its first update": Kind(GRPOConfig(), {}, old=False),
    "paper at temperature 0.7": Kind(GRPOConfig(), {"temperature": 0.7}, temperature=0.7),
    "k3_unbiased": Kind(GRPOConfig(divergence="k3_unbiased"), {"use_bias_correction_kl": True}),
    "k3_unbiased at its first update": Kind(
        GRPOConfig(divergence="k3_unbiased"), {"use_bias_correction_kl": True}, old=False
    ),
    "ppo, or grpo without a reference": Kind(PPOConfig(), {"beta": 0.0}),
    "another clip range": Kind(GRPOConfig(eps=0.05, beta=0.3), {"epsilon": 0.05, "beta": 0.3}),
    "token mean": Kind(GRPOConfig(aggregation="token_mean"), {"loss_type": "bnpo"}),
    "constant length": Kind(GRPOConfig(aggregation="constant", length=LONGEST), {"loss_type": "dr_grpo"}),
    "dr_grpo": Kind(DrGRPOConfig(length=LONGEST), {"loss_type": "dr_grpo", "beta": 0.0}),
    "dapo": Kind(DAPOConfig(), {"loss_type": "dapo", "beta": 0.0, **WIDE}),
    "gspo": Kind(
        GSPOConfig(eps_low=0.02, eps_high=0.03),
        {"importance_sampling_level": "sequence", "beta": 0.0, "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    # TRL's epsilon_high is the cap itself, ours what it is above 1.
    "cispo": Kind(CISPOConfig(eps_high=0.2), {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.2}),
}


class Engine:
    """An `Engine` of one process that only forwards, in float32."""

    device, rank, world_size, max_logits = "cpu", 0, 1, None

    def __init__(self, model: Any) -> None:
        self.model = model

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """None is needed."""
        return contextlib.nullcontext()


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("parity")
    small = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 2, "intermediate": 64}
    made = Workload(str(folder), questions=2, group=4, tokens=LONGEST, steps=1, threads=1, **small)
    make_policy(made)
    made.prompt_file.write_text(json.dumps([made.peer_row({"question": text, "answer": ""}) for text in "ab"]))
    made.save()
    return made


@pytest.fixture(scope="module")
def policy(workload: Workload) -> Any:
    return AutoModelForCausalLM.from_pretrained(workload.policy, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Two questions of four outputs, of unequal lengths, with advantages of either sign."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 128, (count,), generator=generator).tolist())

    prompts, lengths = [ids(5), ids(9)], [12, 3, 7, 1, 12, 8, 5, 10]
    advantages = [1.5, -0.5, -0.5, -0.5, -1.2, 0.4, 1.0, -0.2]
    return [
        Example(f"q{place // 4}", prompts[place // 4], ids(length), (advantage,) * length, 1.0)
        for place, (length, advantage) in enumerate(zip(lengths, advantages, strict=True))
    ]


@pytest.fixture(scope="module")
def frozen(policy: Any, examples: list[Example]) -> dict[str, Tensor]:
    """log pi_old and log pi_ref of every output [outputs, LONGEST], apart from log pi_theta so that some tokens are clipped."""
    generator = torch.Generator().manual_seed(2)
    logp = torch.zeros(len(examples), LONGEST)
    for place, example in enumerate(examples):
        (batch,) = micro_batches([Row(example.prompt_ids, example.output_ids)], 10**6)
        with torch.no_grad():
            logp[place, : len(example.output_ids)] = completion_logprobs(policy, batch).logp_BO[0]
    noise = torch.randn(2, *logp.shape, generator=generator)
    return {"old": logp + 0.2 * noise[0], "ref": logp + 0.3 * noise[1]}


@pytest.fixture(scope="module")
def theirs(
    workload: Workload, examples: list[Example], frozen: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What TRL computes of every kind."""
    folder = tmp_path_factory.mktemp("trl")
    width = max(len(example.prompt_ids) for example in examples)
    prompts, outputs = torch.zeros(8, width, dtype=torch.long), torch.zeros(8, LONGEST, dtype=torch.long)
    masks = torch.zeros_like(prompts), torch.zeros_like(outputs)
    for row, example in enumerate(examples):
        prompts[row, width - len(example.prompt_ids) :] = torch.tensor(example.prompt_ids)
        masks[0][row, width - len(example.prompt_ids) :] = 1
        outputs[row, : len(example.output_ids)] = torch.tensor(example.output_ids)
        masks[1][row, : len(example.output_ids)] = 1
    rows = {"prompt_ids": prompts, "prompt_mask": masks[0], "completion_ids": outputs, "completion_mask": masks[1]}
    rows |= {"advantages": torch.tensor([example.advantage[0] for example in examples])}
    rows |= {"old_logps": frozen["old"], "ref_logps": frozen["ref"]}
    save_file(rows, folder / "rows.safetensors")
    kinds = {name: {"settings": kind.trl, "old": kind.old} for name, kind in KINDS.items()}
    (folder / "kinds.json").write_text(json.dumps(kinds))
    paths = [Path(workload.folder) / "workload.json", folder / "kinds.json", folder / "rows.safetensors"]
    command = [str(PYTHON), "-m", "benchmarks.trl_losses", *map(str, paths), str(folder / "found.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "found.safetensors")


def ours(kind: Kind, policy: Any, examples: list[Example], frozen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the update stage, in micro-batches of unequal sizes."""
    config = UpdateConfig(objective=kind.ours, micro_batch_tokens=48)
    method = method_of(kind.ours)
    policy.zero_grad()
    mini_batch = MiniBatch.of(examples, Engine(policy), kind.temperature, config, method)  # type: ignore[arg-type]
    assert len(mini_batch.parts) > 2
    total = torch.zeros(1)
    for part in mini_batch.parts:
        logp_BO = completion_logprobs(policy, part.batch, kind.temperature).logp_BO
        terms = micro_batch_terms(logp_BO, _with(part, kind, frozen), method, config.correction)
        loss = -(part.weight.to(logp_BO.dtype) * terms.objective_BO).sum()
        loss.backward()
        total += loss.detach()
    return total, torch.cat([p.grad.flatten() for _, p in sorted(policy.named_parameters())])


def _with(part: MicroBatch, kind: Kind, frozen: dict[str, Tensor]) -> MicroBatch:
    rows, width = list(part.batch.rows), part.batch.output_mask_BO.shape[1]
    old = frozen["old"][rows, :width] if kind.old else None
    reference = frozen["ref"][rows, :width] if method_of(kind.ours).needs_reference else None
    return dataclasses.replace(part, old_logp=old, ref_logp=reference)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradient_are_those_of_trl(
    name: str, policy: Any, examples: list[Example], frozen: dict[str, Tensor], theirs: dict[str, Tensor]
) -> None:
    loss, gradient = ours(KINDS[name], policy, examples, frozen)
    assert float((loss - theirs[f"{name}/loss"]).abs()) < TOLERANCE
    assert float((gradient - theirs[f"{name}/gradient"]).abs().max()) < TOLERANCE
    assert float(gradient.norm()) > 0.01


def test_trl_as_it_comes_has_another_kl_gradient_than_the_paper(theirs: dict[str, Tensor]) -> None:
    """What the comparison trained with before, also at ratio 1, where the two losses have one value."""
    for plain, default in (
        ("paper", "k3_unbiased"),
        ("paper at its first update", "k3_unbiased at its first update"),
    ):
        apart = (theirs[f"{plain}/gradient"] - theirs[f"{default}/gradient"]).abs().max()
        assert float(apart) > 100 * TOLERANCE
    losses = [theirs[f"{name} at its first update/loss"] for name in ("paper", "k3_unbiased")]
    assert float((losses[0] - losses[1]).abs()) < TOLERANCE


def test_both_clip_somewhere(policy: Any, examples: list[Example], frozen: dict[str, Tensor]) -> None:
    kind = KINDS["paper"]
    config, method = UpdateConfig(objective=kind.ours), method_of(kind.ours)
    (part,) = MiniBatch.of(examples, Engine(policy), 1.0, config, method).parts  # type: ignore[arg-type]
    logp_BO = completion_logprobs(policy, part.batch).logp_BO
    clipped_BO = micro_batch_terms(logp_BO, _with(part, kind, frozen), method, config.correction).surrogate.clipped_BT
    shares = clipped_BO[part.batch.output_mask_BO].float().mean()
    assert 0.05 < float(shares) < 0.5
