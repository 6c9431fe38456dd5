"""The `chorale` command: everything that the operator's shell can ask for.

Owns the assembly of the commands only. Invariant: importing it starts nothing.
"""

import typer

from serve.cli.adapters_command import adapters_app
from serve.cli.adapters_export import export
from serve.cli.audit_command import audit
from serve.cli.finetune_command import finetune
from serve.cli.keys_command import keys_app
from serve.cli.loadtest_command import loadtest
from serve.cli.plan_command import plan
from serve.cli.serve_command import serve
from serve.cli.store_command import redis_acl, store_app
from serve.cli.train_worker_command import train_worker
from serve.cli.tune_command import tune
from serve.cli.version import installed_version

app = typer.Typer(
    name="chorale",
    help="One frozen base model, many adapters, different adapters in the same batch.",
    no_args_is_help=True,
    add_completion=False,
    # plain help and plain tracebacks: both end up in logs
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(tune)
app.command()(plan)
app.command()(train_worker)
app.command()(finetune)
app.command()(audit)
adapters_app.command()(export)
app.add_typer(adapters_app)
app.add_typer(store_app)
app.command("redis-acl")(redis_acl)
# everything after the name, --help too, belongs to the tester
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(add_help_option=False, context_settings=_PASSED_ON)(loadtest)
app.add_typer(keys_app)


@app.command("version")
def show_version() -> None:
    """Print the version."""
    typer.echo(f"chorale {installed_version()}")
