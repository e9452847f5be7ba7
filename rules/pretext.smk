rule pretext_train:
    """Trains a teacher on its pretext task; without a task it stays as given, or random."""
    input:
        pack=pack_of("pretext"),
        report=data_report_of("pretext"),
        budget=budget_packs,
        given=lambda w: plan.weights_file(teacher_of(w)) or [],
    output:
        weights="results/teachers/{teacher}/s{seed}/model.safetensors",
        model="results/teachers/{teacher}/s{seed}/model.json",
        log="results/teachers/{teacher}/s{seed}/log.jsonl",
        examples="results/teachers/{teacher}/s{seed}/examples.h5",
    log:
        "results/logs/pretext_train/{teacher}-s{seed}.log",
    benchmark:
        "results/benchmarks/pretext_train/{teacher}-s{seed}.tsv"
    priority: urgency
    conda:
        "../envs/kt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=memory(4000, mapped=True),
        runtime=minutes(lambda w: 1440 if teacher_of(w).task else 60),
        processes=1,  # one a GPU: --set-resources pretext_train:processes=4
        nodes=1,  # more of them: docs/howto.md
    params:
        folder="results/teachers/{teacher}/s{seed}",
        state=lambda w: plan.state(f"{w.teacher}-s{w.seed}", pretext_params(w)),
        describe=lambda w: dumps(plan.describe_teacher(SETTINGS, w.teacher, int(w.seed))),
        backbone=lambda w: pretext_params(w)["backbone"],
        task=lambda w: pretext_params(w)["task"],
        weights=lambda w: pretext_params(w)["weights"],
        training=lambda w: pretext_params(w)["training"],
        epochs=lambda w: pretext_params(w)["epochs"],
        few=lambda w: pretext_params(w)["few"],
        budget=lambda w: pretext_params(w)["budget"],
        seed=lambda w: pretext_params(w)["seed"],
        # Statistics of larger images are taken from smaller batches since.
        stage_version=2 if SETTINGS.datasets[SETTINGS.use.pretext].size <= 134 else "v3",
    message:
        "pretext_train {wildcards.teacher} s{wildcards.seed}"
    shell:
        "python -m kt.pretext_train"
        " --pack {input.pack:q}"
        " --data-report {input.report:q}"
        " --backbone {params.backbone:q}"
        " --task {params.task:q}"
        " --weights {params.weights:q}"
        " --training {params.training:q}"
        " --epochs {params.epochs}"
        " {params.few:q}"
        " --budget {params.budget:q}"
        " --seed {params.seed}"
        " --describe {params.describe:q}"
        " --state {params.state:q}"
        " --processes {resources.processes}"
        " --nodes {resources.nodes}"
        " --output {params.folder:q}"
        " --threads {threads}"
        " --log {log:q}"


rule choose:
    """Chooses layer and k of a teacher without labels, where the configuration says `auto`."""
    input:
        unpack(network_of),
        pack=pack_of("cluster"),
    output:
        "results/choices/{teacher}.json",
    log:
        "results/logs/choose/{teacher}.log",
    benchmark:
        "results/benchmarks/choose/{teacher}.tsv"
    priority: 20
    conda:
        "../envs/kt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=memory(4000),
        runtime=minutes(60, 150),
    params:
        folder=lambda w: DESCRIBERS[w.teacher].folder,
        layers=lambda w: lessons.choices(SETTINGS)[w.teacher],
        # Text, for Snakemake compares sets of values: with 1 and 2 as seed and map, one would hide.
        map=lambda w: str(DESCRIBERS[w.teacher].map),
        pool=lambda w: DESCRIBERS[w.teacher].pool,
        mirror=lambda w: ["--mirror"][: DESCRIBERS[w.teacher].mirror],
        clustering=dumps(plan.clustering(SETTINGS)),
        choice=dumps(SETTINGS.choice),
        seed=SETTINGS.seed,
        stage_version=1,
    message:
        "choose {wildcards.teacher}"
    shell:
        "python -m kt.choose"
        " --model {params.folder:q}"
        " --layers {params.layers:q}"
        " --map {params.map}"
        " --pool {params.pool:q}"
        " {params.mirror:q}"
        " --pack {input.pack:q}"
        " --clustering {params.clustering:q}"
        " --choice {params.choice:q}"
        " --seed {params.seed}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"


rule features:
    """Writes one layer's features of a teacher, or given ones, for the images of a pack."""
    input:
        unpack(features_input),
        choice=choice_of,
        pack="results/data/{dataset}/{split}.h5",
        parts=parts_of_features,
    output:
        "results/features/{teacher}/{layer}/{dataset}-{split}.h5",
    log:
        "results/logs/features/{teacher}-{layer}-{dataset}-{split}.log",
    benchmark:
        "results/benchmarks/features/{teacher}-{layer}-{dataset}-{split}.tsv"
    priority: 20
    conda:
        "../envs/kt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=memory(4000),
        runtime=minutes(60, 150),
    params:
        source=features_source,
        stage_version=2,
    message:
        "features {wildcards.teacher} {wildcards.layer} on {wildcards.dataset} {wildcards.split}"
    shell:
        "python -m kt.features"
        " {params.source:q}"
        " --pack {input.pack:q}"
        " --parts {input.parts:q}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"


rule features_part:
    """Writes the features of a part of a pack's images, where `shards` says that several jobs do."""
    input:
        unpack(features_input),
        choice=choice_of,
        pack="results/data/{dataset}/{split}.h5",
    output:
        temp("results/parts/features/{teacher}/{layer}/{dataset}-{split}/{part}-of-{parts}.h5"),
    log:
        "results/logs/features_part/{teacher}-{layer}-{dataset}-{split}-{part}-of-{parts}.log",
    benchmark:
        "results/benchmarks/features_part/{teacher}-{layer}-{dataset}-{split}-{part}-of-{parts}.tsv"
    priority: 20
    conda:
        "../envs/kt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=memory(4000),
        runtime=minutes(60, 150),
    params:
        source=features_source,
        stage_version=2,
    message:
        "features_part {wildcards.part}/{wildcards.parts} of {wildcards.teacher} {wildcards.layer} on {wildcards.dataset} {wildcards.split}"
    shell:
        "python -m kt.features"
        " {params.source:q}"
        " --pack {input.pack:q}"
        " --part {wildcards.part}/{wildcards.parts}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"
