"""`python -m serve` is the `chorale` command."""

from serve.cli.app import app

if __name__ == "__main__":
    app(prog_name="chorale")
