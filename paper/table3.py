"""Table 3: the layer and the channels in which a model's stable outliers emerge, as the finder sees
them on the paper's two prompts.

    python -m paper.table3                                the embedded default
    python -m paper.table3 --model llama2-7b              any model: a name, a directory, a hub id

Read top to bottom: the row of a model; the command.

What this file does not do: the finder, the prompts and the table as printed are in kvsink.py.
"""

import torch

import kvsink
from paper import command
from support import cli, hub, text
from support.evaluate import load_model
from support.machine import pick_machine


def table_3(model, prompts, name):
    """Run the finder on each of `prompts`, token ids (1, n), and return the model's row of Table 3
    as a dict. Layers are counted from 0, as printed. Raises ValueError if there are no stable
    outliers."""
    found = [kvsink.stable_outliers(model, tokens) for tokens in prompts]
    sites = {(outliers.l_E - 1, outliers.channels[0]) for outliers in found}
    printed = kvsink.TABLE_3.get(name)
    return {
        "model": name,
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "prompts": [
            {
                "emergence": outliers.l_E - 1,
                "channels": outliers.channels,
                "magnitudes": [round(magnitude, 1) for magnitude in outliers.magnitudes],
            }
            for outliers in found
        ],
        "prompts_agree": len(sites) == 1,
        "table_3": printed and {"emergence": printed.emergence, "channels": printed.channels},
        "table_3_agrees": printed and sites == {(printed.emergence, printed.channels[0])},
    }


def print_table_3(row):
    size = f"{row['layers']} layers, hidden size {row['hidden_size']}"
    print(f"\nTable 3 (layers counted from 0): {row['model']}, {size}")
    for i, outliers in enumerate(row["prompts"], start=1):
        pairs = zip(outliers["channels"], outliers["magnitudes"])
        channels = ", ".join(f"{c} ({magnitude:,.0f})" for c, magnitude in pairs)
        emergence = f"outliers emerge in layer {outliers['emergence']}"
        print(f"  prompt {i}: {emergence}, channels (magnitudes) {channels}")
    agree = "agree" if row["prompts_agree"] else "DISAGREE"
    print(f"  the prompts {agree} on layer and first channel")
    if not row["table_3"]:
        print("  Table 3 does not list this model", flush=True)
        return
    default = row["model"] == hub.DEFAULT_MODEL
    source = "kvsink.py's row (not the paper's)" if default else "Table 3"
    agrees = "agrees" if row["table_3_agrees"] else "DISAGREES"
    site = f"layer {row['table_3']['emergence']}"
    channels = ", ".join(map(str, row["table_3"]["channels"]))
    print(f"  {source} {agrees} on them: {site}, channels {channels}", flush=True)


# --------------------------------------------------------------------------------------------------
# The command


def report(config, loaded):
    """Measure and print Table 3's row of a model that is loaded."""
    directory, model, tokenizer = loaded
    prompts = [torch.tensor([tokenizer.encode(prompt)]) for prompt in kvsink.PROMPTS]
    for tokens in prompts:
        text.check_vocabulary(tokens, model.config, directory)
    prompts = [tokens.to(model.device) for tokens in prompts]
    print_table_3(table_3(model, prompts, config.model))


def run(config):
    report(config, load_model(config.model, config.machine))


def parse(argv):
    parser = cli.Parser(
        prog="python -m paper.table3",
        description="Table 3 of the paper: the layer and the channels in which a model's stable "
        "outliers emerge.",
    )
    cli.add_model_options(parser.add_argument)
    command.add_machine_options(parser)
    args = parser.parse_args(argv)
    return command.AnalysisConfig(args.model, pick_machine(args))


def main(argv=None):
    return cli.run_command("paper.table3", lambda: run(parse(argv)), "run with --device cpu")


if __name__ == "__main__":
    cli.exit_process(main())
