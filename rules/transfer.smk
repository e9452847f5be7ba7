rule cluster:
    input:
        f"results/features/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}-train-unlabelled.h5",
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
        mem_mb=lambda w, input: 2000 + 4 * input.size_mb,
        runtime=240,
    params:
        settings=dumps(SETTINGS.clustering),
        seed=SETTINGS.seed,
        stage_version=1,
    """Clusters the features of a teacher's layer with k-means."""
    message:
        "cluster {wildcards.teacher} {wildcards.layer} k={wildcards.k}"
    shell:
        "python -m kt.cluster"
        " --features {input:q}"
        " --k {wildcards.k}"
        " --settings {params.settings:q}"
        " --seed {params.seed}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"


rule pseudo_labels:
    input:
        features="results/features/{teacher}/{layer}/{dataset}-{split}.h5",
        clusters=f"results/clusters/{{teacher}}/{{layer}}/{SETTINGS.use.cluster}/k{{k}}.h5",
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
        mem_mb=2000,
        runtime=60,
    params:
        describe=lambda w: dumps({"teacher": w.teacher, "layer": w.layer, "k": int(w.k)}),
        stage_version=1,
    """Gives every image of a split the index of its nearest centroid."""
    message:
        "pseudo_labels {wildcards.teacher} {wildcards.layer} k={wildcards.k} for {wildcards.dataset} {wildcards.split}"
    shell:
        "python -m kt.pseudo_labels"
        " --features {input.features:q}"
        " --clusters {input.clusters:q}"
        " --describe {params.describe:q}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"


def pseudo_labels_of(teacher, layer, k):
    """Gives the pseudo-labels of the images that train the targets."""
    clustered, labelled = SETTINGS.use.cluster, SETTINGS.use.target
    folder = f"results/pseudo_labels/{teacher}/{layer}/{clustered}/k{k}"
    return f"{folder}/{labelled}-train-unlabelled.h5"


def supervised(wildcards):
    """Says whether a target's folder is that of the supervised bound."""
    return wildcards.origin == "supervised"


def target_input(wildcards):
    """Gives what a target learns from: pseudo-labels, or the true ones for the bound."""
    if supervised(wildcards):
        return {
            "pack": pack_of("evaluate", "train"),
            "labels": pack_of("evaluate", "train-labels"),
            "report": data_report_of("evaluate"),
            "budget": pack_of("target"),
        }
    teacher, layer, k = wildcards.origin.split("/")
    return {
        "pack": pack_of("target"),
        "labels": pseudo_labels_of(teacher, layer, k.removeprefix("k")),
        "report": data_report_of("target"),
    }


def target_labels(wildcards, input):
    """Gives the options that name the labels."""
    if supervised(wildcards):
        return ["--labels", input.labels, "--budget-of", input.budget]
    return ["--pseudo-labels", input.labels]


def target_params(wildcards):
    """Gives everything a target is trained with, as JSON by option."""
    target = SETTINGS.targets[wildcards.target]
    return {
        "backbone": dumps(target.backbone),
        "task": dumps(target.task),
        "training": dumps(target.training),
        "epochs": plan.epochs(SETTINGS, target.training),
        "seed": SETTINGS.seed + int(wildcards.seed),
    }


rule target_train:
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
        origin=r"supervised|[^/]+/[^/]+/k\d+",
    conda:
        "../envs/kt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=4000,
        runtime=2880,
    params:
        folder="results/targets/{target}/{origin}/s{seed}",
        state=lambda w: "results/state/{}-{}-s{}-{}".format(
            w.target, w.origin.replace("/", "-"), w.seed, plan.fingerprint(target_params(w))
        ),
        describe=lambda w: dumps(plan.describe_target(SETTINGS, w.target, w.origin, int(w.seed))),
        labels=target_labels,
        backbone=lambda w: target_params(w)["backbone"],
        task=lambda w: target_params(w)["task"],
        training=lambda w: target_params(w)["training"],
        epochs=lambda w: target_params(w)["epochs"],
        seed=lambda w: target_params(w)["seed"],
        stage_version=1,
    """Trains a target from scratch on pseudo-labels, or on true labels for the bound."""
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
        " --seed {params.seed}"
        " --describe {params.describe:q}"
        " --state {params.state:q}"
        " --output {params.folder:q}"
        " --threads {threads}"
        " --log {log:q}"
