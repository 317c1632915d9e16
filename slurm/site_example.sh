# A site's environment, sourced by the batch script: cluster.environment_file=slurm/site_example.sh (copy and edit).
# module load cuda/13.0
export NCCL_DEBUG=WARN
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export HF_HUB_OFFLINE=1
