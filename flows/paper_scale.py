"""The paper's own run as a config: DeepSeekMath-Instruct 7B and every number that section 4.2 gives. Nobody has run it here.

Sources as in `flows/recipes.py`. It names files and models that you have to have; `cohort recipes deepseekmath_7b` prints it.
"""

from __future__ import annotations

from flows.config import EvaluationPlan, FileData, IterativeRLConfig, PretrainedPolicy, RewardModelPlan
from stages.advantage import GroupConfig
from stages.data import QuestionFileConfig
from stages.evaluation import EvaluationConfig
from stages.prompts import PromptConfig
from stages.reward import AccuracyConfig, RewardConfig
from stages.reward_training import ReplayConfig, RewardTrainingConfig
from stages.rollout import HFBackendConfig, RolloutConfig
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig
from stages.update import GRPOConfig, UpdateConfig

__all__ = ["deepseekmath_7b"]


def deepseekmath_7b() -> IterativeRLConfig:
    """DeepSeekMath-RL 7B with the paper's numbers (4.2); for machines that hold such a model, never run here."""
    return IterativeRLConfig(
        name="deepseekmath_7b",
        experiment="deepseekmath",
        data=FileData(
            path=".",  # --set data.path=FOLDER
            train=QuestionFileConfig(path="train.jsonl"),  # 4.2: the 144K questions of GSM8K and MATH in the SFT data
            evaluation={
                "gsm8k": QuestionFileConfig(
                    path="gsm8k_test.jsonl", remove_calculator_marks=True
                ),  # Table 5, in domain
                "math": QuestionFileConfig(path="math_test.jsonl"),  # Table 5, in domain
                "cmath": QuestionFileConfig(path="cmath_test.jsonl"),  # Table 5, out of domain
            },
        ),
        prompt=PromptConfig(template="deepseek_math_en", chat="deepseek_math"),  # the authors' README
        policy=PretrainedPolicy(path="deepseek-math-7b-instruct"),  # 4.2
        sft=None,  # 4.2: RL begins with Instruct 7B, which is fine-tuned already
        iterations=3,  # 5.2.1, Fig. 6: Iteration-0, 1 and 2
        steps=1770,  # Fig. 6, read off: about 5,300 in all
        questions_per_step=16,  # 4.2: a batch of 1,024, read as outputs
        rollout=RolloutConfig(
            G=64,  # 4.2
            temperature=1.0,  # ours; the paper gives none
            max_output_tokens=1024,  # 4.2
            backend=HFBackendConfig(dtype="bfloat16"),  # ours
        ),
        reward=RewardConfig(components=(AccuracyConfig(verifier="math_verify"),)),  # 5.2.1: labels by the rule judgment
        reward_model=RewardModelPlan(
            trunk="base",  # ours: the policy's folder; 4.2 begins with Base 7B, which is another
            questions=1024,  # ours; the paper gives no number
            training=RewardTrainingConfig(
                training=TrainingConfig(
                    engine=DeepSpeedEngineConfig(zero_stage=3),  # ours
                    optimizer=AdamWConfig(learning_rate=2e-5),  # 4.2
                )
            ),
            replay=ReplayConfig(share=0.1),  # 4.1.4
        ),
        advantage=GroupConfig(supervision="outcome"),  # 4.1.2
        update=UpdateConfig(
            objective=GRPOConfig(eps=0.2, beta=0.04),  # eps ours, beta 4.2
            mu=1,  # 4.2: a single update following each exploration stage
            training=TrainingConfig(
                engine=DeepSpeedEngineConfig(zero_stage=3),  # ours
                optimizer=AdamWConfig(learning_rate=1e-6),  # 4.2
            ),
        ),
        reference_pass="stage",  # ours: no second model beside the one that is trained
        evaluation=EvaluationPlan(
            every=100,  # ours
            samples=64,  # Fig. 7
            temperature=0.7,  # Fig. 7
            estimates=EvaluationConfig(ks=(1, 4, 8, 16, 32, 64)),  # Fig. 7
        ),
    )
