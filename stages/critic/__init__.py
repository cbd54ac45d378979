"""The learned value function of PPO (DeepSeekMath, 4.1.1): made from a policy, asked for values, fitted to returns."""

from stages.critic.stage import CriticConfig, create_critic, estimate_values, update_critic

__all__ = ["CriticConfig", "create_critic", "estimate_values", "update_critic"]
