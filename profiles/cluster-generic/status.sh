#!/bin/sh
# Says what became of a Slurm job. Another scheduler needs its own command here, and the same three
# words. A job that nobody knows any more counts as failed: it is sent again. One that cannot be
# asked after, as the server does not answer, is taken to run.
found=$(squeue --noheader --states=all --format=%T --jobs="$1" 2>&1) || case $found in
*"Invalid job id"*) found= ;;
*) found=RUNNING ;;
esac
# The queue forgets a job after some minutes; the accounts, where there are some, do not.
[ -n "$found" ] || found=$(sacct -X --noheader --parsable2 --format=State --jobs="$1" 2>/dev/null)
case $found in
COMPLETED) echo success ;;
PENDING | CONFIGURING | RUNNING | COMPLETING | SUSPENDED | REQUEUED | RESIZING | STOPPED) echo running ;;
*) echo failed ;;
esac
