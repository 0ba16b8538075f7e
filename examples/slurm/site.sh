# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# What differs between clusters, and nothing else. Copy it, change it, and name it: export SITE=/path/to/my_site.sh
# Account and partition go the way sbatch knows itself: export SBATCH_ACCOUNT=... SBATCH_PARTITION=...

# The Python with requirements.txt, at the same path on every node; load modules here where you need them.
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# What sbatch is asked for by run_all.sh: preprocessing, the small models (reference, score, proxy), the main model.
# One task a GPU. USR1 comes five minutes before the end: the run saves and its script requeues it.
CPU_JOB=(--nodes=1 --ntasks=1 --cpus-per-task=16 --mem-per-cpu=2G --time=12:00:00)
SMALL_JOB=(--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --exclusive --time=24:00:00)
MAIN_JOB=(--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --exclusive --time=24:00:00)
SIGNAL=(--signal=USR1@300)
PREPROCESS_TASKS=${PREPROCESS_TASKS:-32}   # tasks of the arrays
SCORE_TASKS=${SCORE_TASKS:-4}

# MASTER_ADDR: the first node of a job, unless that name does not resolve on your network.
# export NCCL_SOCKET_IFNAME=ib0
