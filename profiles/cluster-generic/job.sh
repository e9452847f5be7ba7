#!/bin/sh
# properties = {properties}
# A scheduler that ends a job may tell this shell alone, and kill all the others when it ends. So it
# tells them, each time, and waits for them. The shell below ignores the signal, or it would not wait.
tell() {{ trap '' TERM USR1; kill -TERM 0; trap tell TERM USR1; }}
trap tell TERM USR1
(trap '' TERM USR1; {exec_job}) &
job=$!
wait $job
code=$?
while [ $code -gt 128 ] && kill -0 $job 2>/dev/null; do wait $job; code=$?; done
exit $code
