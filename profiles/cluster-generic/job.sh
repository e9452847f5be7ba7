#!/bin/sh
# properties = {properties}
# A scheduler that ends a job may tell this shell alone, and kill all the others when it ends. So it
# tells them and waits for them. The shells between ignore the signal, or they would not wait.
trap 'trap : TERM USR1; kill -TERM 0' TERM USR1
(trap '' TERM USR1; {exec_job}) &
job=$!
wait $job
code=$?
if [ $code -gt 128 ]; then wait $job; code=$?; fi
exit $code
