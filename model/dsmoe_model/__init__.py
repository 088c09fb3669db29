"""The oracle: DeepSeekMoE written plainly."""
