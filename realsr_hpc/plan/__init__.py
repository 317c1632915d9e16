"""Memory, bubble and GPU-hours of a recipe: arithmetic, nothing is allocated."""

from realsr_hpc.plan.estimate import Device, Plan, parameter_count, plan

__all__ = ["Device", "Plan", "parameter_count", "plan"]
