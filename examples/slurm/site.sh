# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# The settings that differ between clusters. Copy this file, edit the copy, and export SITE=/path/to/my_site.sh
# Set the account and partition with sbatch's own variables: export SBATCH_ACCOUNT=... SBATCH_PARTITION=...

# A Python with requirements.txt installed, at the same path on every node. Load modules here if you need them.
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# The resources that run_all.sh requests for preprocessing, for the small models (reference, score, proxy), and for the
# main model: one task per GPU. SLURM sends USR1 five minutes before the time limit; the run then saves and is requeued.
CPU_JOB=(--nodes=1 --ntasks=1 --cpus-per-task=16 --mem-per-cpu=2G --time=12:00:00)
SMALL_JOB=(--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --exclusive --time=24:00:00)
MAIN_JOB=(--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --exclusive --time=24:00:00)
SIGNAL=(--signal=USR1@300)
PREPROCESS_TASKS=${PREPROCESS_TASKS:-32}   # tasks of the preprocessing array
SCORE_TASKS=${SCORE_TASKS:-4}              # tasks of the scoring array

# MASTER_ADDR defaults to the first node of a job. Set it if that name does not resolve on your network.
# export NCCL_SOCKET_IFNAME=ib0
