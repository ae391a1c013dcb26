"""Table 3: in which layer and which channels a model's stable outliers emerge, by the finder, on
the paper's two prompts.

    python -m paper.table3                                the embedded default
    python -m paper.table3 --model llama2-7b              one of the paper's models; or any directory or hub id

Read top to bottom: the row of a model; the command.

What this file does not do: the finder, the prompts and the table as printed are in kvsink.py.
"""

import torch

import kvsink
from paper import command
from support import cli, hub, text


def table_3(model, prompts, name):
    """Table 3's row of any model, from the finder, for each of the prompts, token ids (1, n): a
    dict. Layers are counted from 0, as printed. Raises ValueError where there are no stable
    outliers."""
    found = [kvsink.stable_outliers(model, tokens) for tokens in prompts]
    config, row = model.config, kvsink.TABLE_3.get(name)
    sites = {(o.l_E - 1, o.channels[0]) for o in found}
    return {
        "model": name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "prompts": [
            {
                "emergence": o.l_E - 1,
                "channels": o.channels,
                "magnitudes": [round(m, 1) for m in o.magnitudes],
            }
            for o in found
        ],
        "prompts_agree": len(sites) == 1,
        "table_3": row and {"emergence": row.emergence, "channels": row.channels},
        "table_3_agrees": row and sites == {(row.emergence, row.channels[0])},
    }


def print_table_3(row):
    size = f"{row['layers']} layers, hidden size {row['hidden_size']}"
    print(f"\nTable 3 (layers counted from 0): {row['model']}, {size}")
    for i, found in enumerate(row["prompts"], start=1):
        channels = ", ".join(
            f"{c} ({m:,.0f})" for c, m in zip(found["channels"], found["magnitudes"])
        )
        print(
            f"  prompt {i}: outliers emerge in layer {found['emergence']}, channels (magnitudes) {channels}"
        )
    print(
        f"  the prompts {'agree' if row['prompts_agree'] else 'DISAGREE'} on layer and first channel"
    )
    if row["table_3"]:
        channels = ", ".join(map(str, row["table_3"]["channels"]))
        agrees = "agrees" if row["table_3_agrees"] else "DISAGREES"
        whose = (
            "kvsink.py's row (not the paper's)" if row["model"] == hub.DEFAULT_MODEL else "Table 3"
        )
        print(
            f"  {whose} {agrees} on them: layer {row['table_3']['emergence']}, channels {channels}",
            flush=True,
        )
    else:
        print("  Table 3 does not list this model", flush=True)


# --------------------------------------------------------------------------------------------------
# The command


def report(name, machine, loaded):
    """Measure and print Table 3's row of a model that is loaded."""
    directory, model, tokenizer = loaded
    prompts = [torch.tensor([tokenizer.encode(prompt)]) for prompt in kvsink.PROMPTS]
    for tokens in prompts:
        text.check_vocabulary(tokens, model.config, directory)
    print_table_3(table_3(model, [tokens.to(machine.device) for tokens in prompts], name))


def run(name, machine):
    report(name, machine, command.load(name, machine))


def parse(argv):
    parser = cli.Parser(
        prog="python -m paper.table3",
        description="Table 3 of the paper: the layer and the channels in which a model's stable outliers emerge.",
    )
    cli.add_model_options(parser.add_argument)
    command.add_machine_options(parser)
    args = parser.parse_args(argv)
    return args.model, cli.machine(args)


def main(argv=None):
    return cli.run_command("paper.table3", lambda: run(*parse(argv)), "run with --device cpu")


if __name__ == "__main__":
    cli.exit_process(main())
