rule ingest:
    """Packs the images of a data set: oriented, RGB, resized, cropped; labels apart."""
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
        mem_mb=2000,
        runtime=240,
    params:
        folder="results/data/{dataset}",
        dataset=lambda w: dumps(SETTINGS.datasets[w.dataset]),
        seed=SETTINGS.seed,
        state=lambda w: plan.state(
            f"ingest-{w.dataset}", [SETTINGS.datasets[w.dataset], SETTINGS.seed]
        ),
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
