rule cluster:
    """Clusters the features of a teacher's layer with k-means."""
    input:
        features=f"results/features/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}-train-unlabelled.h5",
        choice=choice_of,
    output:
        f"results/clusters/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}/k{{k}}.h5",
    log:
        "results/logs/cluster/{teacher}-{layer}-k{k}.log",
    benchmark:
        "results/benchmarks/cluster/{teacher}-{layer}-k{k}.tsv"
    priority: 20
    conda:
        "../envs/kt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=memory(1000 + SETTINGS.clustering.memory_mb),
        runtime=minutes(60, 40),
        processes=1,  # they share the rows: --set-resources cluster:processes=4
        nodes=1,  # more of them: docs/howto.md
        # A k that a kind of transfer made of that in the config, such as four times it, may be above
        # the number of images. No parameter: a k that gets into the config later is not made again.
        lower=lambda w: int(w.k not in map(str, SETTINGS.clusters)),
        rows_mb=SETTINGS.clustering.memory_mb,  # no parameter either: the result is the same
    params:
        settings=dumps(plan.clustering(SETTINGS)),
        choice=choice_options,
        seed=SETTINGS.seed,
        stage_version=3,
    message:
        "cluster {wildcards.teacher} {wildcards.layer} k={wildcards.k}"
    shell:
        "python -m kt.cluster"
        " --features {input.features:q}"
        " --layer {wildcards.layer:q}"
        " --k {wildcards.k}"
        " {params.choice:q}"
        " --lower {resources.lower}"
        " --settings {params.settings:q}"
        " --memory-mb {resources.rows_mb}"
        " --seed {params.seed}"
        " --processes {resources.processes}"
        " --nodes {resources.nodes}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"


rule pseudo_labels:
    """Gives every image of a split the index of its nearest centroid."""
    input:
        features="results/features/{teacher}/{layer}/{dataset}-{split}.h5",
        clusters=f"results/clusters/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}/k{{k}}.h5",
        parts=lambda w: parts_of(
            w,
            f"results/parts/pseudo_labels/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}/k{{k}}/{{dataset}}-{{split}}/{{part}}-of-{{parts}}.h5",
            f"results/pseudo_labels/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}/k{{k}}/{{dataset}}-{{split}}.h5",
        ),
    output:
        f"results/pseudo_labels/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}/k{{k}}/{{dataset}}-{{split}}.h5",
    log:
        "results/logs/pseudo_labels/{teacher}-{layer}-k{k}-{dataset}-{split}.log",
    benchmark:
        "results/benchmarks/pseudo_labels/{teacher}-{layer}-k{k}-{dataset}-{split}.tsv"
    priority: 20
    conda:
        "../envs/kt.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(30, 10),
    params:
        describe=described_labels,
        stage_version=2,
    message:
        "pseudo_labels {wildcards.teacher} {wildcards.layer} k={wildcards.k} for {wildcards.dataset} {wildcards.split}"
    shell:
        "python -m kt.pseudo_labels"
        " --features {input.features:q}"
        " --clusters {input.clusters:q}"
        " --describe {params.describe:q}"
        " --parts {input.parts:q}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"


rule pseudo_labels_part:
    """Labels a part of a split's images, where `shards` says that several jobs do."""
    input:
        features="results/features/{teacher}/{layer}/{dataset}-{split}.h5",
        clusters=f"results/clusters/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}/k{{k}}.h5",
    output:
        temp(
            f"results/parts/pseudo_labels/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}/k{{k}}/{{dataset}}-{{split}}/{{part}}-of-{{parts}}.h5"
        ),
    log:
        "results/logs/pseudo_labels_part/{teacher}-{layer}-k{k}-{dataset}-{split}-{part}-of-{parts}.log",
    benchmark:
        "results/benchmarks/pseudo_labels_part/{teacher}-{layer}-k{k}-{dataset}-{split}-{part}-of-{parts}.tsv"
    priority: 20
    conda:
        "../envs/kt.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(30, 10),
    params:
        describe=described_labels,
        stage_version=2,
    message:
        "pseudo_labels_part {wildcards.part}/{wildcards.parts} of {wildcards.teacher} {wildcards.layer} k={wildcards.k} for {wildcards.dataset} {wildcards.split}"
    shell:
        "python -m kt.pseudo_labels"
        " --features {input.features:q}"
        " --clusters {input.clusters:q}"
        " --describe {params.describe:q}"
        " --part {wildcards.part}/{wildcards.parts}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"


rule target_train:
    """Trains a target from scratch on pseudo-labels, or on true labels for the bound."""
    input:
        unpack(target_input),
    output:
        weights="results/targets/{target}/{origin}/s{seed}/model.safetensors",
        model="results/targets/{target}/{origin}/s{seed}/model.json",
        log="results/targets/{target}/{origin}/s{seed}/log.jsonl",
    log:
        "results/logs/target_train/{target}-{origin}-s{seed}.log",
    benchmark:
        "results/benchmarks/target_train/{target}-{origin}-s{seed}.tsv"
    wildcard_constraints:
        origin=r"supervised|([^/]+/)?[^/]+/[^/]+/k[^/]+",
    conda:
        "../envs/kt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=memory(4000, mapped=True),
        runtime=minutes(1440),  # it goes on where it was
        processes=1,  # one a GPU: --set-resources target_train:processes=4
        nodes=1,  # more of them: docs/howto.md
    params:
        folder="results/targets/{target}/{origin}/s{seed}",
        state=lambda w: plan.state(
            f"{w.target}/{w.origin}/s{w.seed}", [target_params(w), target_labels(w)]
        ),
        describe=lambda w: dumps(plan.describe_target(SETTINGS, w.target, w.origin, int(w.seed))),
        labels=target_labels,
        backbone=lambda w: target_params(w)["backbone"],
        task=lambda w: target_params(w)["task"],
        training=lambda w: target_params(w)["training"],
        epochs=lambda w: target_params(w)["epochs"],
        few=lambda w: target_params(w)["few"],
        seed=lambda w: target_params(w)["seed"],
        stage_version=lambda w: 2 if w.origin == "supervised" else 1,
    message:
        "target_train {wildcards.target} {wildcards.origin} s{wildcards.seed}"
    shell:
        "python -m kt.target_train"
        " --pack {input.pack:q}"
        " {params.labels:q}"
        " --data-report {input.report:q}"
        " --backbone {params.backbone:q}"
        " --task {params.task:q}"
        " --training {params.training:q}"
        " --epochs {params.epochs}"
        " {params.few:q}"
        " --seed {params.seed}"
        " --describe {params.describe:q}"
        " --state {params.state:q}"
        " --processes {resources.processes}"
        " --nodes {resources.nodes}"
        " --output {params.folder:q}"
        " --threads {threads}"
        " --log {log:q}"
