"""GSM8K: a small model from scratch on a CPU, and an instructed model of half a billion parameters on one GPU.

Sizes of the second are for a GPU of 24 GB (docs/scaling.md has the arithmetic). It has not been run by us.
"""

from __future__ import annotations

from flows.config import EvaluationPlan, FileData, IterativeRLConfig, PretrainedPolicy
from flows.runs.retention import KeepConfig
from stages.advantage import GroupConfig
from stages.data import QuestionFileConfig
from stages.evaluation import EvaluationConfig
from stages.reward import AccuracyConfig, FormatConfig, RewardConfig
from stages.rollout import HFBackendConfig, RolloutConfig, VLLMBackendConfig
from stages.sft import PolicyConfig, SFTConfig
from stages.text import BPETokenizerConfig, PromptConfig
from stages.training import AdamWConfig, DeepSpeedEngineConfig, MuonConfig, TrainingConfig
from stages.update import GRPOConfig, UpdateConfig


def gsm8k_cpu() -> IterativeRLConfig:
    """Real GSM8K questions on a CPU: a small model from scratch, SFT on the real solutions, GRPO on accuracy and format."""
    return IterativeRLConfig(
        name="gsm8k_cpu",
        experiment="gsm8k",
        data=FileData(
            path=".",  # --set data.path=FOLDER
            train=QuestionFileConfig(path="gsm8k_train.jsonl", remove_calculator_marks=True),
            evaluation={
                # ours: 256 of them
                "test": QuestionFileConfig(path="gsm8k_test.jsonl", remove_calculator_marks=True, limit=256)
            },
        ),
        prompt=PromptConfig(suffix="\n"),  # ours: nothing to instruct a model made from scratch
        policy=PolicyConfig(
            settings={  # ours
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 640,
                "tie_word_embeddings": True,
            },
            tokenizer=BPETokenizerConfig(vocab_size=2048),  # ours
        ),
        sft=SFTConfig(
            training=TrainingConfig(
                # ours
                optimizer=MuonConfig(learning_rate=3e-3),
                warmup_steps=40,  # ours
                threads=1,  # ours
            ),
            batch_size=32,  # ours
            max_steps=300,  # ours
            decay_steps=100,  # ours
            length_pool=8,  # ours
        ),
        steps=24,  # ours
        questions_per_step=16,  # 4.2
        rollout=RolloutConfig(
            # ours; 4.2: 64 outputs of 1,024 tokens
            G=8,
            max_output_tokens=160,  # ours
            backend=HFBackendConfig(threads=1),
        ),
        reward=RewardConfig(  # ours
            components=(AccuracyConfig(verifier="exact"), FormatConfig(form="hashes", weight=0.2))
        ),
        update=UpdateConfig(
            micro_batch_tokens=4096,  # ours: larger ones are slower on a CPU
            training=TrainingConfig(
                # ours
                optimizer=AdamWConfig(learning_rate=1e-4),
                threads=1,  # ours
            ),
        ),
        evaluation=EvaluationPlan(every=8, samples=4, estimates=EvaluationConfig(ks=(4,))),  # ours
    )


def gsm8k_one_gpu() -> IterativeRLConfig:
    """GSM8K on one GPU: Qwen2.5-0.5B-Instruct, vLLM and DeepSpeed in turns, accuracy and format; never run here."""
    return IterativeRLConfig(
        name="gsm8k_one_gpu",
        experiment="gsm8k",
        data=FileData(
            path=".",  # --set data.path=FOLDER
            train=QuestionFileConfig(path="gsm8k_train.jsonl", remove_calculator_marks=True),  # 7,473 questions
            evaluation={"test": QuestionFileConfig(path="gsm8k_test.jsonl", remove_calculator_marks=True)},  # all 1,319
        ),
        prompt=PromptConfig(
            template="deepseek_math_en",  # the paper's models' README
            chat="tokenizer",  # ours: the model was instructed in its own template
        ),
        policy=PretrainedPolicy(path="Qwen/Qwen2.5-0.5B-Instruct"),  # ours
        sft=None,  # ours: it is fine-tuned already, as the paper's Instruct is (4.2)
        iterations=1,  # ours; 5.2.1 has two more
        steps=232,  # ours: two passes over the training questions, of 116 steps each
        questions_per_step=64,  # ours: more questions and fewer outputs of each; with G a batch of 1,024 outputs (4.2)
        rollout=RolloutConfig(
            G=16,  # ours; 4.2: 64
            temperature=1.0,  # ours; the paper gives none
            max_output_tokens=512,  # ours: solutions of GSM8K are short; 4.2: 1,024
            backend=VLLMBackendConfig(
                dtype="bfloat16",  # ours
                max_model_len=1024,  # ours: the longest question has 985 characters
                gpu_memory_utilization=0.45,  # ours
            ),
        ),
        reward=RewardConfig(
            components=(
                AccuracyConfig(verifier="exact"),  # 5.2.1: the answer is right; ours: GSM8K's are numbers
                FormatConfig(form="boxed", weight=0.1),  # ours: exactly one box, as the prompt asks; not in the paper
            )
        ),
        advantage=GroupConfig(supervision="outcome"),  # 4.1.2
        update=UpdateConfig(
            objective=GRPOConfig(eps=0.2, beta=0.04),  # eps ours, beta 4.2
            mu=1,  # 4.2
            micro_batch_tokens=16384,  # ours
            training=TrainingConfig(
                # Ours: one rank has nothing to share, and ZeRO would hold a second copy of the weights.
                engine=DeepSpeedEngineConfig(zero_stage=0),
                optimizer=AdamWConfig(learning_rate=1e-6),  # 4.2, of 7 B parameters; ours for this model
                precision="bf16",  # ours
                activation_checkpointing=True,  # ours
            ),
        ),
        reference_pass="stage",  # ours: no second model in memory with the one that is trained
        evaluation=EvaluationPlan(
            every=58,  # ours: twice a pass
            samples=8,  # ours; Fig. 7 has up to 64
            temperature=1.0,  # ours: the policy as it is trained; Fig. 7: 0.7
            estimates=EvaluationConfig(ks=(4, 8)),  # Fig. 7: 1, 4, 8, 16, 32, 64; K = 1 is the accuracy
        ),
        keep=KeepConfig(checkpoints=2, optimizer=1),  # ours: what is needed to go on, and one to fall back on
    )
