"""The paper's studies as experiments, in three sizes: the built-in world on a CPU, the same quicker, and the paper's own.

Sources as in `flows/config/recipes`: "5.2.1" and the like are sections of DeepSeekMath, "ours" is our choice. Arms that name
a `method` have its settings (`flows/config/methods.py`), to which their other overrides are added. The paper's sizes were not
run here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flows.config.methods import PAPER
from flows.config.recipes import BY_REASONING, STUDENT
from pipeline.config import ConfigError
from pipeline.experiment import Experiment

_QUICK_SETS: Final[dict[str, Any]] = {
    "data.evaluation.in_domain.count": 256,  # ours; 512
    "data.evaluation.out_of_domain.count": 128,  # ours; 256
    "evaluation.every": 4,  # ours; 10
}
"""Half the held-out questions, more often. Learned rewards allow no smaller batches nor a smaller reward model: trained on 512
questions its AUC is 0.77, and the policy hacks it within eight steps (docs/lab)."""

_QUICK: Final[dict[str, Any]] = {
    "steps": 16,  # ours; 40
    "questions_per_step": 32,  # ours; 64
    "rollout.G": 8,  # ours; 16
    **_QUICK_SETS,
}
"""Quick sizes: about an eighth of the outputs."""


_QUICK_TOOLS: Final[dict[str, Any]] = {
    "data.evaluation.in_domain.count": 128,  # ours; 512
    "evaluation.every": 20,  # ours; 10
}

_QUICK_PROGRAMS: Final[dict[str, Any]] = {"steps": 29, "data.evaluation.test.limit": 256}  # ours; 116, all 1,319

_WITH_PROGRAMS: Final[dict[str, Any]] = {
    "prompt.template": "raw",
    "prompt.instruction": "Please integrate natural language reasoning with programs to solve the problem above, and put your "
    "final answer within \\boxed{}.",
}
"""The paper's prompt for tool-integrated reasoning (the models' README)."""


@dataclass(frozen=True)
class Scale:
    """What a study is at one size."""

    base: str
    """Recipe that the arms override."""
    learned_base: str
    """The same for a study of iterations, whose rewards are learned."""
    methods: dict[str, Any]
    """For every arm of a study of methods, which has a single iteration."""
    whole: dict[str, Any]
    """For every arm of a study of the whole RL."""
    learned: dict[str, Any]
    """For every arm of a study of iterations."""
    iteration: int
    """Steps of an iteration there."""
    kinds: dict[str, Any]
    """Further held-out sets of kinds that RL does not train on."""
    candidates: dict[str, Any]
    """Held-out sets that 64 candidates are drawn for."""
    mixed: dict[str, Any]
    """Questions from easy to hard, few enough that each is drawn several times."""
    student: dict[str, Any]
    """For every arm of a study of distillation: a policy that is smaller than its teacher."""
    teacher: str
    """`teacher.path` there."""
    tools: tuple[str, dict[str, Any], dict[str, Any]]
    """Of a study of tools: the recipe, what an arm without a tool overrides, and an arm with one."""
    programs: tuple[str, dict[str, Any], dict[str, Any]]
    """The same of a study with real questions and a model made by others."""
    seeds: tuple[int, ...]
    """Of every arm."""


_SHORTER: Final = {"shortest": 2, "longest": 2}  # ours: next to 3-5 numbers, where RL trains, and 6; SFT saw 2 to 6


def _mixed(*, count: int, held_out: int) -> dict[str, Any]:
    """Return chains of 2 to 8 numbers, of which SFT saw those of up to 6; all sizes are ours.

    The recipe's set `out_of_domain`, of 6 numbers, is in the domain here.
    """
    lengths = {"shortest": 2, "longest": 8}
    sets = {"in_domain": {"count": held_out, **lengths}, "long": {"count": held_out // 2, **lengths, "shortest": 7}}
    return {"data.train": {"count": count, **lengths}, "data.evaluation": sets}


_NO_TOOL: Final[dict[str, Any]] = {
    "environment": None,
    # No output is right without a calculator: a run that learns nothing is what the arm is to show.
    "preflight": {"truncated": None, "unreadable": None, "without_signal": None},
}
_CPU: Final = Scale(
    base="arithmetic_cpu",
    learned_base="arithmetic_learned_reward",
    methods={},
    whole={},
    learned={},
    iteration=10,  # ours
    kinds={"data.evaluation.shorter": {"count": 256, **_SHORTER}},  # ours
    candidates={},
    mixed=_mixed(count=512, held_out=512),
    student=STUDENT,
    teacher="arithmetic_teacher",  # ours: the base's own policy, exported
    tools=("arithmetic_tools", _NO_TOOL, {}),
    programs=("gsm8k_tools", BY_REASONING, {}),
    seeds=(0, 1, 2),  # ours; the paper shows one curve each
)
_SMALL: Final = Scale(
    base="arithmetic_cpu",
    learned_base="arithmetic_learned_reward",
    methods=_QUICK,
    whole=_QUICK,
    learned=_QUICK_SETS,
    iteration=8,  # ours
    kinds={"data.evaluation.shorter": {"count": 128, **_SHORTER}},  # ours
    candidates={"data.evaluation.in_domain.count": 128, "data.evaluation.out_of_domain.count": 64},  # ours
    mixed=_mixed(count=128, held_out=256),
    student=STUDENT,
    teacher="arithmetic_teacher",
    tools=("arithmetic_tools", _NO_TOOL | _QUICK_TOOLS, _QUICK_TOOLS),
    programs=("gsm8k_tools", BY_REASONING | _QUICK_PROGRAMS, _QUICK_PROGRAMS),
    seeds=(0, 1, 2),  # ours
)
_TABLE_5: Final = ("deepseekmath_7b", dict[str, Any](), {"environment": {"kind": "python"}, **_WITH_PROGRAMS})
_PAPER: Final = Scale(
    base="deepseekmath_7b",
    learned_base="deepseekmath_7b",
    methods={
        "policy.path": "deepseek-math-1.3b-instruct",  # 5.2.1: Fig. 5 is of Instruct 1.3B
        "iterations": 1,  # 5.2.1
        "steps": 8500,  # Fig. 5, read off
    },
    whole={},  # 4.2
    learned={},  # 4.2
    iteration=1770,  # Fig. 6, read off: about 5,300 in all
    kinds={},  # Table 5: the recipe's
    candidates={},
    mixed={"keep.rollouts": None},
    student={},  # of `methods`: 1.3 B
    teacher="deepseek-math-7b-rl",  # ours: the paper's policy after RL
    tools=_TABLE_5,
    programs=_TABLE_5,
    seeds=(0,),  # the paper shows one curve each
)
SCALES: Final = {"": _CPU, "quick": _SMALL, "paper": _PAPER}
"""By the option that chooses it, which is added to the experiment's name."""


def _study(
    scale: Scale,
    name: str,
    asks: str,
    arms: dict[str, dict[str, Any]],
    common: dict[str, Any],
    *,
    learned: bool = False,
) -> Experiment:
    """Make a study whose baseline is its first arm; `learned`: with learned rewards."""
    return Experiment(
        name=name,
        asks=asks,
        base=scale.learned_base if learned else scale.base,
        common=common,
        arms=arms,
        baseline=next(iter(arms)),
        seeds=scale.seeds,
    )


def fig5(scale: Scale) -> Experiment:
    """RFT, Online RFT, GRPO with outcome and with process supervision."""
    asks = (
        "Fig. 5: is online better than offline, a graded coefficient better than a rule, and process supervision best?"
    )
    arms = {
        "rft": {"method": "rft"},  # 5.2.1
        "online_rft": {"method": "online_rft"},  # 5.2.1
        "grpo_os": {"method": "grpo"},  # 5.2.1; ours: rules reward, where the paper has a model
        "grpo_ps": {"method": "grpo_process"},  # 5.2.1; ours: rules label the steps, exactly
    }
    return _study(scale, "fig5", asks, arms, scale.methods)


def fig6(scale: Scale) -> Experiment:
    """Iterative RL: each iteration goes on from the one before, with a new reference and a retrained reward model."""
    steps = scale.iteration
    asks = "Fig. 6: what does each further iteration, with a new reference and a retrained reward model, add?"
    arms = {
        # 5.2.1: Iteration-0, -1 and -2. A longer arm continues the shorter ones, whose steps it shares.
        "iteration_0": {"iterations": 1, "steps": steps},
        "iteration_1": {"iterations": 2, "steps": steps},
        "iteration_2": {"iterations": 3, "steps": steps},
        # Ours: as many steps without a second iteration, to separate what iterations do from what steps do.
        "one_long": {"iterations": 1, "steps": 3 * steps},
    }
    return _study(scale, "fig6", asks, arms, scale.learned, learned=True)


def fig7(scale: Scale) -> Experiment:
    """Maj@K and Pass@K before and after RL, from 64 samples of each policy."""
    evaluation = {
        "evaluation.every": 0,  # 5.2.2: the policy before RL against that after it
        "evaluation.samples": 64,  # Fig. 7
        "evaluation.temperature": 0.7,  # Fig. 7
        "evaluation.estimates.ks": [1, 4, 8, 16, 32, 64],  # Fig. 7
    }
    arms = {"grpo": {"method": "grpo"}}  # 5.2.2
    common = scale.whole | evaluation | scale.candidates
    return _study(scale, "fig7", "Fig. 7: does RL raise Maj@K, and Pass@K as well?", arms, common)


def online_vs_offline(scale: Scale) -> Experiment:
    """RFT against Online RFT, and GRPO on the policy's own outputs against GRPO on frozen ones."""
    asks = "What is learned from: the initial policy's outputs for ever, or those of the policy as it is?"
    arms = {
        "rft": {"method": "rft"},  # 5.2.1
        "online_rft": {"method": "online_rft"},  # 5.2.1
        # Ours: the same question asked of GRPO. Its ratio is to the policy that sampled, whose log-probabilities the
        # rollout has recorded.
        "grpo_offline": {"method": "grpo", "data_source": "initial_policy", "update.old_logprobs": "rollout"},
        "grpo": {"method": "grpo"},
    }
    return _study(scale, "online_vs_offline", asks, arms, scale.methods)


def outcome_vs_process(scale: Scale) -> Experiment:
    """GRPO with one reward for an output against one for each of its steps."""
    asks = "Does a reward for every step teach more than one for the answer (4.1.2 against 4.1.3)?"
    arms = {"outcome": {"method": "grpo"}, "process": {"method": "grpo_process"}}
    return _study(scale, "outcome_vs_process", asks, arms, scale.methods)


def single_vs_iterative(scale: Scale) -> Experiment:
    """Equally many steps in one, two or three iterations, with learned rewards."""
    total = 3 * scale.iteration
    asks = "Are equally many steps worth more with a new reference and reward model on the way (4.1.4)?"
    arms = {f"iterations_{count}": {"iterations": count, "steps": total // count} for count in (1, 2, 3)}
    return _study(scale, "single_vs_iterative", asks, arms, scale.learned, learned=True)


def methods(scale: Scale) -> Experiment:
    """The six rows of Table 10."""
    asks = "Table 10: what do the six methods make of one supervised policy with equally many outputs?"
    return _study(scale, "methods", asks, {method: {"method": method} for method in PAPER}, scale.methods)


def in_and_out_of_domain(scale: Scale) -> Experiment:
    """RL on chains of three to five numbers; what becomes of shorter and of longer ones."""
    asks = "Table 5: does RL on some questions raise the accuracy on kinds of questions that it never saw?"
    arms = {"sft": {"method": "sft"}, "grpo": {"method": "grpo"}}  # ours: sft learns on from as many demonstrations
    return _study(scale, "in_and_out_of_domain", asks, arms, scale.whole | scale.kinds)


def overlap(scale: Scale) -> Experiment:
    """GRPO from outputs of the policy as it is, and of the one before its last update, which are sampled meanwhile."""
    asks = "What does sampling while the policy is updated cost in accuracy per step, and bring in accuracy per second?"
    lag: dict[str, Any] = {"method": "grpo", "overlap": 1}
    arms = {
        "none": {"method": "grpo"},
        "clipped": lag | {"update.old_logprobs": "rollout"},  # ours: the ratio is to the policy that sampled
        # Ours: the ratio is to the policy before the update, and outputs are weighed by that over the one that sampled.
        "corrected": lag | {"update.old_logprobs": "trainer", "update.correction": {"kind": "truncated"}},
    }
    return _study(scale, "overlap", asks, arms, scale.methods)


def curriculum(scale: Scale) -> Experiment:
    """GRPO on all questions alike, and on those that the policy solves sometimes; each also with dynamic sampling."""
    asks = "Do questions chosen by their earlier rewards teach more per step, or save draws of dynamic sampling?"
    uniform: dict[str, Any] = {"method": "grpo"}
    band: dict[str, Any] = uniform | {"curriculum": {}}  # ours: the defaults
    again = {"dynamic_sampling": 3}  # ours
    arms = {"uniform": uniform, "band": band, "dynamic": uniform | again, "band_dynamic": band | again}
    # Ours: rules reward, since dynamic sampling is by theirs.
    return _study(scale, "curriculum", asks, arms, scale.methods | scale.mixed | {"reward_model": None})


def distillation(scale: Scale) -> Experiment:
    """A small policy that learns from a large one: from its verdict on each token, or from its outputs; and from rewards."""
    teacher = {"teacher": {"path": scale.teacher}}
    asks = "What does a small policy learn from a good one's log-probabilities, from its outputs, and from rewards?"
    arms: dict[str, dict[str, Any]] = {
        "grpo": {"method": "grpo"},
        "distillation": {"method": "distillation"} | teacher,
        "teachers_outputs": {"method": "sft", "data_source": "teacher"} | teacher,
    }
    return _study(scale, "distillation", asks, arms, scale.methods | scale.student)


def tools(scale: Scale) -> Experiment:
    """One policy that reasons by itself, and one that calls a tool."""
    return _tools(scale, "tools", *scale.tools)


def gsm8k_tools(scale: Scale) -> Experiment:
    """GSM8K by chain of thought and with Python: both columns of Table 5, from one instructed policy."""
    return _tools(scale, "gsm8k_tools", *scale.programs)


def _tools(scale: Scale, name: str, recipe: str, without: dict[str, Any], given: dict[str, Any]) -> Experiment:
    asks = "Table 5: what does a policy learn that reasons by itself, and what one whose calls are answered?"
    study = _study(scale, name, asks, {"chain_of_thought": without, "tools": given}, {})
    return study.override({"base": recipe})


_STUDIES: Final = (
    *(fig5, fig6, fig7, methods),
    *(online_vs_offline, outcome_vs_process, single_vs_iterative, in_and_out_of_domain, overlap),
    *(curriculum, distillation, tools, gsm8k_tools),
)
EXPERIMENTS: Final[dict[str, Callable[[Scale], Experiment]]] = {make.__name__: make for make in _STUDIES}
"""Every study by name."""


def named_experiment(name: str, *, scale: str = "") -> Experiment:
    """Return a study of the paper by its name, or the experiment in a YAML file.

    Args:
        scale: a key of `SCALES`. It is added to the name, so that another size has results of its own.

    Raises:
        ConfigError: no such study or file, or what is wrong in the file.
    """
    if name in EXPERIMENTS:
        experiment = EXPERIMENTS[name](SCALES[scale])
        return experiment.override({"name": f"{name}-{scale}"}) if scale else experiment
    file = Path(name)
    if not file.is_file():
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"experiments: {', '.join(EXPERIMENTS)}"
        raise ConfigError(f"{name}: neither an experiment nor a YAML file; {hint}")
    if scale:
        raise ConfigError(f"--{scale}: {name} has one size; another one is a matter of --set")
    try:
        return Experiment.from_yaml(file.read_text(encoding="utf-8"), source=name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read: {error}") from None
