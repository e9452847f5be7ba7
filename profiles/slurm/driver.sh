#!/bin/bash
# The workflow itself as a job, for sites that end long processes on the nodes where one submits.
# From the folder of this project, with Snakemake's options:
#
#   sbatch profiles/slurm/driver.sh --directory myphotos --config images=/shared/photos
#
# It takes one core. Five minutes before its time is over it stops its jobs, which save their states,
# and sends itself again, with the account, partition and QOS that it was given (sbatch -A ... -p ... -q ...).
#SBATCH --job-name=kt --cpus-per-task=1 --mem=2000 --time=1-00:00:00
#SBATCH --signal=B:USR1@300 --output=kt-%j.log
set -m # else Snakemake would ignore Ctrl-C's signal
# What is said of this job is not true of those that it submits; where Slurm is, is.
same="${SLURM_JOB_ACCOUNT:+--account=$SLURM_JOB_ACCOUNT}"
same="$same ${SLURM_JOB_PARTITION:+--partition=$SLURM_JOB_PARTITION}"
same="$same ${SLURM_JOB_QOS:+--qos=$SLURM_JOB_QOS}"
for name in ${!SLURM_@}; do [ "$name" = SLURM_CONF ] || unset "$name"; done
again() {
    kill -INT $driver
    wait $driver
    sbatch $same profiles/slurm/driver.sh "$@"
    exit
}
trap 'again "$@"' USR1
snakemake --workflow-profile profiles/slurm "$@" &
driver=$!
wait $driver
