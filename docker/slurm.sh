#!/usr/bin/env bash
# Train on several nodes with a launcher on each. From the root of the repository, with options of sbatch before the
# script:
#
#     sbatch --nodes 4 docker/slurm.sh tools/train.py CONFIG --launcher pytorch --auto-scale-lr --resume
#
# Environment:
#   CONTAINER  an Apptainer image made from docker/Dockerfile (default: the environment in which sbatch was called).
#              DATA and WORK_DIRS are the folders that the container sees as data and work_dirs.
#   PROCESSES  the number of processes on each node (default: one for each GPU)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME  the network interface between nodes (default: tools/launch.py and NCCL find
#              it)
#
#SBATCH --job-name=mmlocalmamba
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time limit, all processes get the signal, write a checkpoint and exit with code 75.
#SBATCH --signal=USR1@120
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Jobs may share a node, so the port depends on the job.
port=$((20000 + SLURM_JOB_ID % 10000))
# srun does not inherit this setting from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
container=()
if [ -n "${CONTAINER:-}" ]; then
    container=(apptainer exec --nv --bind "${DATA:-$PWD/data}:/data" --bind "${WORK_DIRS:-$PWD/work_dirs}:/work_dirs"
        --pwd /opt/mmlocalmamba "$CONTAINER")
fi

# All processes exit by themselves after one of them gets a signal, so a node that exits must not end the others. Slurm
# signals every process of a node, including this shell, which must survive to report the exit code. srun's exit code is
# the highest of the nodes' codes. A node that had to be killed (137) must not hide that another node exited with 75 and
# a checkpoint, so 75 is mapped to the highest code.
code=0
# shellcheck disable=SC2016  # the shell on the node expands these
srun --kill-on-bad-exit=0 \
    bash -c 'trap : USR1 TERM; "$@"; code=$?; case $code in 75) exit 255 ;; 255) exit 1 ;; *) exit $code ;; esac' node \
    "${container[@]}" python tools/launch.py \
    --nnodes "${#nodes[@]}" --nproc-per-node "${PROCESSES:-gpu}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${nodes[0]}:$port" "$@" || code=$?
if [ "$code" = 255 ]; then
    code=75
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
