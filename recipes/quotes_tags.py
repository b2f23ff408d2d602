"""LoRA on OPT-6.7B in int8 with a classifier on top: which tags a quote has, several at once.

    accelerate launch --config_file accelerate_configs/fsdp.yaml recipes/quotes_tags.py

Sequence classification: the tags are the classes (the most frequent `--num_labels` of them), the head is new and
trained whole beside the adapters, and held-out quotes are scored by micro and macro F1. Load the result with
`AutoPeftModelForSequenceClassification.from_pretrained(DIR, num_labels=N)`; `labels.json` names the classes.
Without a GPU the same command trains the small OPT that ships with the package, on quotes that ship with it.

Expect, with the embedded base on 2 CPU ranks: micro F1 from 0.15 to 0.83 in 300 steps.
"""

from lora_dist.config import TrainConfig
from lora_dist.entry import run_recipe

GPU = {"model_name_or_path": "facebook/opt-6.7b", "dataset_name": "Abirate/english_quotes"}
EMBEDDED = {  # where there is no GPU
    "model_name_or_path": "embedded", "learning_rate": 5e-3, "max_length": 64, "dataset_name": "embedded",
}  # fmt: skip
CONFIG = TrainConfig(
    model_name_or_path=None,  # GPU's or EMBEDDED's
    dataset_name=None,
    task_type="SEQ_CLS",
    dataset_text_field="quote",
    dataset_label_field="tags",
    num_labels=8,
    quantization="int8",
    lora_r=16,
    lora_alpha=32,
    lora_target_modules=["q_proj", "v_proj"],
    max_length=256,
    train_sampling_strategy="group_by_length",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    max_steps=300,
    learning_rate=2e-4,
    warmup_steps=20,
)


def main(config: TrainConfig) -> None:
    from lora_dist import session  # here, so that a mistyped flag is answered before torch is imported
    from lora_dist.data.formats import load_tokenizer
    from lora_dist.data.rows import prepare_rows
    from lora_dist.parallel.strategies import read_launch
    from lora_dist.training.evaluation import held_out_labels, predict
    from lora_dist.training.loop import train
    from lora_dist.training.scores import f1_scores

    # Where are we?
    launch = read_launch(config)
    config, decision = session.choose_defaults(config, CONFIG, gpu=GPU, embedded=EMBEDDED)

    # Data, and what the base allows: before the ranks meet, so that no collective waits for a tokenizer.
    tokenizer = load_tokenizer(config.model_name_or_path)
    data = prepare_rows(config, tokenizer)
    plan = session.plan_base(config, launch, tokenizer, data.classes)

    with session.open_session(config, "quotes_tags", launch, data) as (accelerator, folder):
        say = accelerator.on_main_process(print)
        say(f"{decision}\n{data.table()}\nclasses: {', '.join(data.classes)}")

        # Model
        run = session.prepare_training(config, plan, data, tokenizer, accelerator, folder)
        say(session.banner(run, launch.strategy), flush=True)

        def score():
            return f1_scores(predict(run) > 0, held_out_labels(run) > 0)  # a logit of 0 is a probability of 1/2

        # Train
        with session.metrics_log(run, launch.strategy) as metrics:
            scores = {f"{name}_base": value for name, value in score().items()}
            measured = train(run, metrics)
            if measured["steps"] == run.num_steps:  # else preempted: leave soon
                scores |= score()
                metrics.log({f"eval/{name}": scores[name] for name in ("micro_f1", "macro_f1")}, measured["steps"])
                say(f"micro F1: {scores['micro_f1_base']:.2f} base, {scores['micro_f1']:.2f} base + adapter")
                say(f"macro F1: {scores['macro_f1_base']:.2f} base, {scores['macro_f1']:.2f} base + adapter")

            # Save
            session.finish(run, launch.strategy, {**measured, **scores}, metrics)


if __name__ == "__main__":
    run_recipe(main, CONFIG, description=__doc__)
