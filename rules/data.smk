rule ingest:
    """Packs the images of a data set: oriented, RGB, resized, cropped; labels apart."""
    input:
        parts=lambda w: parts_of(
            w,
            "results/parts/ingest/{dataset}/{part}-of-{parts}.txt",
            "results/data/{dataset}/report.json",
        ),
    output:
        packs=expand(
            "results/data/{{dataset}}/{split}.h5", split=["train-unlabelled", "train", "test"]
        ),
        labels=expand(
            "results/data/{{dataset}}/{split}-labels.h5",
            split=["train-unlabelled", "train", "test"],
        ),
        report="results/data/{dataset}/report.json",
    log:
        "results/logs/ingest/{dataset}.log",
    benchmark:
        "results/benchmarks/ingest/{dataset}.tsv"
    conda:
        "../envs/kt.yaml"
    threads: 2
    resources:
        mem_mb=memory(2000),
        runtime=minutes(240),
    params:
        folder="results/data/{dataset}",
        dataset=lambda w: dumps(SETTINGS.datasets[w.dataset]),
        seed=SETTINGS.seed,
        state=ingest_state,
        stage_version=2,
    message:
        "ingest {wildcards.dataset}"
    shell:
        "python -m kt.ingest"
        " --dataset {params.dataset:q}"
        " --seed {params.seed:q}"
        " --state {params.state:q}"
        " --output {params.folder:q}"
        " --threads {threads}"
        " --log {log:q}"


rule ingest_part:
    """Decodes a part of a data set's images, where `shards` says that several jobs do."""
    output:
        temp("results/parts/ingest/{dataset}/{part}-of-{parts}.txt"),
    log:
        "results/logs/ingest_part/{dataset}-{part}-of-{parts}.log",
    benchmark:
        "results/benchmarks/ingest_part/{dataset}-{part}-of-{parts}.tsv"
    conda:
        "../envs/kt.yaml"
    threads: 2
    resources:
        mem_mb=memory(2000),
        runtime=minutes(240),
    params:
        dataset=lambda w: dumps(SETTINGS.datasets[w.dataset]),
        seed=SETTINGS.seed,
        state=ingest_state,
        stage_version=2,
    message:
        "ingest_part {wildcards.part}/{wildcards.parts} of {wildcards.dataset}"
    shell:
        "python -m kt.ingest"
        " --dataset {params.dataset:q}"
        " --seed {params.seed:q}"
        " --state {params.state:q}"
        " --part {wildcards.part}/{wildcards.parts}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"
