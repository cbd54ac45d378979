"""The paper's own run: DeepSeekMath-Instruct 7B and every number that section 4.2 gives. It has not been run by us.

It names files and models that you need to have. What is ours is for 8 GPUs of 80 GB on one host (docs/scaling.md has the
arithmetic).
"""

from __future__ import annotations

from flows.config import EvaluationPlan, FileData, IterativeRLConfig, PretrainedPolicy, RewardModelPlan
from flows.runs.retention import KeepConfig
from stages.advantage import GroupConfig
from stages.data import QuestionFileConfig
from stages.evaluation import EvaluationConfig
from stages.reward import AccuracyConfig, RewardConfig
from stages.reward_model import ScoringConfig
from stages.reward_training import PointwiseConfig, ReplayConfig, RewardModelConfig, RewardTrainingConfig
from stages.rollout import RolloutConfig, VLLMBackendConfig
from stages.text import PromptConfig
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig
from stages.update import GRPOConfig, UpdateConfig


def deepseekmath_7b() -> IterativeRLConfig:
    """DeepSeekMath-RL 7B with the paper's numbers (4.2), on 8 GPUs; never run here."""
    return IterativeRLConfig(
        name="deepseekmath_7b",
        experiment="deepseekmath",
        data=FileData(
            path=".",  # --set data.path=FOLDER
            # 4.2: the 144K questions of GSM8K and MATH in the SFT data. 5,310 steps of 16 ask 84,960 of them, each once.
            train=QuestionFileConfig(path="train.jsonl"),
            # Ours: the English sets of Table 5; its Chinese ones have a Chinese prompt, and a run has one.
            evaluation={
                "gsm8k": QuestionFileConfig(path="gsm8k_test.jsonl", remove_calculator_marks=True),
                "math": QuestionFileConfig(path="math_test.jsonl"),
            },
        ),
        prompt=PromptConfig(template="deepseek_math_en", chat="deepseek_math"),  # the authors' README
        policy=PretrainedPolicy(path="deepseek-math-7b-instruct"),  # 4.2
        sft=None,  # 4.2: RL begins with Instruct 7B, which is fine-tuned already
        iterations=3,  # 5.2.1, Fig. 6: two rounds of iteration after Iteration-0; the reward model is trained on twice
        steps=1770,  # Fig. 6, read off: about 5,300 in all
        questions_per_step=16,  # 4.2: a batch of 1,024, read as outputs
        rollout=RolloutConfig(
            G=64,  # 4.2
            temperature=1.0,  # ours; the paper gives none
            max_output_tokens=1024,  # 4.2
            backend=VLLMBackendConfig(
                dtype="bfloat16",  # ours
                tensor_parallel_size=8,  # ours: one engine over all GPUs
                gpu_memory_utilization=0.4,  # ours
                max_num_seqs=512,  # ours: about as many as there is room for keys and values of
            ),
        ),
        # 5.2.1: labels by the rule judgment. Workers: ours, two a GPU.
        reward=RewardConfig(components=(AccuracyConfig(verifier="math_verify"),), workers=16),
        reward_model=RewardModelPlan(
            models=(RewardModelConfig(kind="outcome"),),  # ours: outcome or process (4.1.2, 4.1.3), 4.2 does not say
            trunk=PretrainedPolicy(path="deepseek-math-7b-base"),  # 4.2: Base 7B, not Instruct
            questions=1024,  # ours; the paper gives no number
            training=RewardTrainingConfig(
                objective=PointwiseConfig(),  # 4.2 follows Math-Shepherd, which fits labels one by one
                epochs=1,  # ours; the paper gives no number
                questions_per_update=32,  # ours; the paper gives no number
                micro_batch_tokens=8192,  # ours
                training=_training(learning_rate=2e-5),  # 4.2
            ),
            scoring=ScoringConfig(precision="bf16"),  # ours
            retrain=True,  # 4.1.4; Algorithm 1, line 11
            replay=ReplayConfig(share=0.1),  # 4.1.4: 10 % of historical data
            held_out_questions=128,  # ours
        ),
        advantage=GroupConfig(supervision="outcome"),  # ours: as the reward model; computed as 4.1.2 has it
        update=UpdateConfig(
            objective=GRPOConfig(eps=0.2, beta=0.04),  # eps ours, beta 4.2
            mu=1,  # 4.2: a single update following each exploration stage
            mini_batches=1,  # 4.2
            micro_batch_tokens=8192,  # ours: 4 GB of hidden states
            training=_training(learning_rate=1e-6),  # 4.2
        ),
        reference_pass="stage",  # ours: no second model in memory with the one that is trained
        evaluation=EvaluationPlan(
            every=1770,  # ours: after each iteration, since 64 samples of each question are as many outputs as 400 steps
            samples=64,  # Fig. 7
            temperature=0.7,  # Fig. 7
            estimates=EvaluationConfig(ks=(1, 4, 8, 16, 32, 64)),  # Fig. 7
        ),
        keep=KeepConfig(checkpoints=2, optimizer=1),  # ours: what is needed to go on, and one to fall back on
    )


def _training(*, learning_rate: float) -> TrainingConfig:
    """Return the training of policy and reward model; but for the learning rate the paper gives nothing here."""
    return TrainingConfig(
        engine=DeepSpeedEngineConfig(
            ranks=8,  # ours
            zero_stage=3,  # ours: weights, gradients and moments are shared out
            offload="optimizer",  # ours: policy, reward model and their frozen copies take turns on 80 GB
        ),
        optimizer=AdamWConfig(learning_rate=learning_rate),
        precision="bf16",  # ours
        activation_checkpointing=True,  # ours
    )
