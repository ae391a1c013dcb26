"""The two commands of the course.

python -m course handout FOLDER                     write the students' repository
python -m course grade FOLDER [--json results.json] grade a submission
python -m course grade --class FOLDER [--csv FILE]  grade a folder of submissions
"""

from pathlib import Path

from course import handout
from support import cli


def parse(argv):
    """The work that the options ask for, to be called. Raises ValueError for options that cannot
    be."""
    parser = cli.Parser(prog="python -m course", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="handout or grade")
    add = commands.add_parser("handout", description="Write the students' repository.").add_argument
    add("folder", type=Path, help="a new folder, or an empty one")
    add = commands.add_parser(
        "grade", description="Grade a submission, or with --class a folder of them."
    ).add_argument
    add("folder", type=Path, nargs="?", help="the submission: a folder like the handout")
    add(
        "--class",
        type=Path,
        dest="many",
        metavar="FOLDER",
        help="grade each folder in this one, and write a CSV file",
    )
    add("--json", type=Path, metavar="FILE", help="also write Gradescope's results.json")
    add("--csv", type=Path, metavar="FILE", help="where --class writes (default: grades.csv)")
    args = parser.parse_args(argv)
    if args.command == "handout":
        return lambda: handout.write(args.folder)
    from course import grade  # which wants fork and resource limits: Linux, macOS

    if bool(args.folder) == bool(args.many):
        raise ValueError("grade takes a submission's FOLDER, or --class FOLDER")
    if args.many and args.json or args.folder and args.csv:
        raise ValueError("--json belongs to one submission, --csv to --class")
    folder = args.folder or args.many
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    file = args.json if args.folder else args.csv or Path("grades.csv")
    cli.check_file(file)
    return lambda: (grade.grade_one if args.folder else grade.grade_class)(folder, file)


def main(argv=None):
    return cli.run_command("course", lambda: parse(argv)(), "close other programs")


if __name__ == "__main__":
    cli.exit_process(main())
