"""Estimates memory, pipeline bubble, traffic and GPU-hours of a recipe without allocating anything, and suggests
changes if it does not fit."""

from realsr_hpc.plan.advice import Knob, knobs, way_to_fit
from realsr_hpc.plan.estimate import Plan, plan
from realsr_hpc.plan.seconds import H100, H200, Device
from realsr_hpc.plan.sizes import parameter_count

__all__ = ["H100", "H200", "Device", "Knob", "Plan", "knobs", "parameter_count", "plan", "way_to_fit"]
