"""The learned value function of PPO (DeepSeekMath, 4.1.1): made from a policy, asked for values, fitted to returns."""

from stages.critic.config import CriticConfig
from stages.critic.creation import create_critic
from stages.critic.update import update_critic
from stages.critic.values import estimate_values

__all__ = ["CriticConfig", "create_critic", "estimate_values", "update_critic"]
