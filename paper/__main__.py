"""The paper's analysis of one model, in one go: Tables 1 and 3 and the figures; and a list of the
commands."""

from dataclasses import replace

from paper import command, figures, table1, table3
from support import cli
from support.evaluate import load_model

COMMANDS = """\
python -m paper.table1     Table 1: errors of quantized Keys and Values, with sinks and without
python -m paper.table2     Table 2: perplexity and average bits, KVSink with KVQuant
python -m paper.table3     Table 3: the layer and the channels in which stable outliers emerge
python -m paper.table4     Table 4: time and memory of a packed cache, and of predicting the sinks
python -m paper.figures    Figures 1, 2, 4-7 and 10-23; Figure 9 from results of eval_ppl.py
python -m paper.generate   Equations 5 and 6: text from a packed cache
"""


def run(config):
    loaded = load_model(config.model, config.machine)
    table3.report(config, loaded)
    subject = command.calibrate(config, loaded, command.find_sinks(config, loaded))
    table1.report(config, subject)
    figures.report(config, subject)


def parse(argv):
    parser = cli.Parser(
        prog="python -m paper",
        description="Tables 1 and 3 and all figures but Figure 9, of one model on one text. Each "
        f"command by itself:\n\n{COMMANDS}",
    )
    command.add_options(parser)
    command.add_machine_options(parser)
    args = parser.parse_args(argv)
    figures.check_matplotlib()
    return replace(command.analysis_config(args), figures=tuple(figures.FIGURES))


def main(argv=None):
    return cli.run_command("paper", lambda: run(parse(argv)), command.ADVICE)


if __name__ == "__main__":
    cli.exit_process(main())
