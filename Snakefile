"""From unlabelled images to a small network that has learned from them.

    snakemake --cores 4                                  the default run, Fashion-MNIST
    snakemake --cores 4 --config images=PATH             your own pictures
    snakemake --cores 4 --config 'clusters=[100,200]'    one more k

The rules stand in the order in which the data flows; each calls the program of its name in kt/.
"""

from snakemake.utils import min_version

min_version("9.17")


include: "rules/common.smk"
include: "rules/jobs.smk"
include: "rules/data.smk"
include: "rules/pretext.smk"
include: "rules/transfer.smk"
include: "rules/evaluate.smk"


onstart:
    check_before_jobs()


onsuccess:
    drop_finished_states()
    drop_orphaned_parts()


onerror:
    end_with_the_code_of_the_step(log)


rule all:
    default_target: True
    input:
        "results/report/index.html",
    message:
        "all is done"
