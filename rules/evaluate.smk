MODELS = {model.name: model for model in plan.judged(SETTINGS, LABELLED)}
JOBS = plan.evaluation_jobs(SETTINGS, LABELLED)
TRAINED = sorted(
    {folder for model in MODELS.values() for folder in model.folders()}
    | {f"results/teachers/{name}/s0" for name in plan.at_work(SETTINGS)}
    | {found.folder for name, found in DESCRIBERS.items() if name not in SETTINGS.teachers}
)
SHOWN = [pseudo_labels_of(*source) for source in lessons.shown(SETTINGS)]


rule evaluate:
    """Judges all seeds of a model: everything on frozen features, or by fine-tuning."""
    input:
        weights=lambda w: [f"{folder}/model.safetensors" for folder in MODELS[w.model].folders()],
        models=lambda w: [f"{folder}/model.json" for folder in MODELS[w.model].folders()],
        report=data_report_of("evaluate"),
    output:
        "results/evaluations/{model}/{job}.json",
    log:
        "results/logs/evaluate/{model}-{job}.log",
    benchmark:
        "results/benchmarks/evaluate/{model}-{job}.tsv"
    wildcard_constraints:
        model=r".+",
    conda:
        "../envs/kt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=memory(5000),
        runtime=minutes(480),
    params:
        folders=lambda w: MODELS[w.model].folders(),
        seeds=lambda w: [SETTINGS.seed + seed for seed in MODELS[w.model].seeds],
        describe=lambda w: dumps(MODELS[w.model].describe),
        evaluations=lambda w: dumps(JOBS[w.job]),
        data=lambda w: os.path.dirname(data_report_of("evaluate")),
        state=lambda w: plan.state(
            f"{w.model}/{w.job}", [JOBS[w.job], SETTINGS.seed, plan.EVALUATE_VERSION]
        ),
        stage_version=plan.EVALUATE_VERSION,
    message:
        "evaluate {wildcards.model} {wildcards.job}"
    shell:
        "python -m kt.evaluate"
        " --model {params.folders:q}"
        " --seeds {params.seeds}"
        " --describe {params.describe:q}"
        " --evaluations {params.evaluations:q}"
        " --data {params.data:q}"
        " --state {params.state:q}"
        " --output {output:q}"
        " --threads {threads}"
        " --log {log:q}"


rule report:
    """Gathers everything into one page, one table of metrics and a verdict."""
    input:
        evaluations=expand("results/evaluations/{model}/{job}.json", model=MODELS, job=JOBS),
        models=expand("{folder}/model.json", folder=TRAINED),
        logs=expand("{folder}/log.jsonl", folder=TRAINED),
        puzzles=lambda w: [
            f"results/teachers/{name}/s0/examples.h5" for name in plan.first_of_each_task(SETTINGS)
        ],
        data_report=data_reports(),
        choices=expand("results/choices/{teacher}.json", teacher=lessons.choices(SETTINGS)),
        pack=pack_of("target"),
        labels=pack_of("target", "train-unlabelled-labels"),
        pseudo_labels=SHOWN,
        tables=sorted(lessons.all_tables(SETTINGS) - set(SHOWN)),
    output:
        page="results/report/index.html",
        metrics="results/report/metrics.json",
        csv="results/report/metrics.csv",
        summary="results/report/summary.txt",
    log:
        "results/logs/report.log",
    benchmark:
        "results/benchmarks/report.tsv"
    conda:
        "../envs/kt.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000, mapped=True),
        runtime=minutes(30),
    params:
        folder=lambda w, output: os.path.dirname(output.page),
        models=TRAINED,
        settings=lambda w: dumps(SETTINGS),  # as a string, its braces would be wildcards
        stage_version=1,
    message:
        "report"
    shell:
        "python -m kt.report"
        " --evaluations {input.evaluations:q}"
        " --models {params.models:q}"
        " --puzzles {input.puzzles:q}"
        " --data-report {input.data_report:q}"
        " --pack {input.pack:q}"
        " --labels {input.labels:q}"
        " --pseudo-labels {input.pseudo_labels:q}"
        " --choices {input.choices:q}"
        " --tables {input.tables:q}"
        " --settings {params.settings:q}"
        " --output {params.folder:q}"
        " --log {log:q}"
