#!/bin/sh
# Says what became of a job of Kubernetes. One that it no longer knows counts as failed: it is sent
# again, and waits for the old one if that lives after all. One that cannot be asked after, as the
# server does not answer, is taken to run. One whose image cannot be had would wait for ever.
path='{.status.succeeded}/{.status.failed}/{.status.conditions[*].type}'
found=$(kubectl get "$1" --ignore-not-found --output "jsonpath=$path") || { echo running; exit; }
case $found in
1/*) echo success; exit ;;
'' | */*/*Fail*) echo failed; exit ;;
esac
path='{.items[*].status.containerStatuses[*].state.waiting.reason}'
waits=$(kubectl get pods --selector="job-name=${1#*/}" --output "jsonpath=$path" 2>/dev/null)
case $waits in
ImagePullBackOff | InvalidImageName | CreateContainerConfigError)
    echo "$1 cannot start: $waits; see image, volume and namespace in job.yaml" >&2
    kubectl delete --wait=false "$1" >/dev/null 2>&1
    echo failed
    ;;
*) echo running ;;
esac
