"""The three commands of the course.

python -m course handout FOLDER                     write the students' repository
python -m course handout --part 2                   print what they get after their predictions
python -m course grade FOLDER [--json results.json] grade a submission
python -m course grade --class FOLDER [--csv FILE]  grade a folder of submissions
python -m course page [FILE]                        write the lecture page (sinks.html)
"""

from pathlib import Path

from course import handout, page
from course.problems import text_of
from support import cli


def main(argv=None):
    return cli.run_command("course", lambda: run(parse_arguments(argv)), "close other programs")


def run(args):
    if args.command == "handout":
        if args.part:
            print(text_of("problem7_part2.md"))
        else:
            handout.write(args.folder)
        return
    if args.command == "page":
        page.run(args)
        return
    from course import grade  # only here, because it needs fork and resource limits: Linux, macOS

    if args.folder:
        grade.grade_one(args.folder, args.json)
    else:
        grade.grade_class(args.submissions, args.csv or Path("grades.csv"))


def parse_arguments(argv):
    """Return the options. Raises ValueError, in one line, if they are wrong."""
    parser = cli.Parser(prog="python -m course", description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="page, handout or grade"
    )
    add = commands.add_parser("handout", description="Write the students' repository.").add_argument
    add("folder", type=Path, nargs="?", help="a new folder, or an empty one")
    add("--part", type=int, choices=[2], help="print part 2 of Problem 7 instead")
    description = "Grade a submission, or with --class a folder of submissions."
    add = commands.add_parser("grade", description=description).add_argument
    add("folder", type=Path, nargs="?", help="the submission: a folder like the handout")
    add(
        "--class",
        type=Path,
        dest="submissions",
        metavar="FOLDER",
        help="grade each folder in this one, and write a CSV file",
    )
    add("--json", type=Path, metavar="FILE", help="also write Gradescope's results.json")
    add("--csv", type=Path, metavar="FILE", help="the file that --class writes (grades.csv)")
    page.add_options(commands.add_parser("page", description="Write the lecture page."))
    args = parser.parse_args(argv)
    if args.command == "handout" and bool(args.folder) == bool(args.part):
        raise ValueError("handout takes a new FOLDER, or --part 2")
    if args.command == "grade":
        check_grade_options(args)
    return args


def check_grade_options(args):
    if bool(args.folder) == bool(args.submissions):
        raise ValueError("grade takes a submission's FOLDER, or --class FOLDER")
    if args.submissions and args.json or args.folder and args.csv:
        raise ValueError("--json belongs to one submission, --csv to --class")
    folder = args.folder or args.submissions
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    cli.check_file(args.json if args.folder else args.csv or Path("grades.csv"))


if __name__ == "__main__":
    cli.exit_process(main())
