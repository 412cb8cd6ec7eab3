"""`recognition settings` and `recognition recipes`: what can be set, and what comes with the program."""

import click

from recognition.cli.command import command


@command("settings", examples="recognition settings training.epochs\nrecognition settings | less")
@click.argument("key", required=False, metavar="[SECTION[.KEY]]")
def settings(key: str | None) -> None:
    """Explain a setting, or all of them.

    Prints meaning, type and default.
    """
    from recognition.config import reference

    click.echo((reference.markdown() if key is None else reference.describe(key)).rstrip("\n"))


@command("recipes", examples="recognition recipes\nrecognition recipes demo > my.toml")
@click.argument("name", required=False, metavar="[NAME]")
def show_recipes(name: str | None) -> None:
    """List the recipes that come with the program, or print one."""
    from recognition.config import recipes
    from recognition.errors import UserError

    if name is None:
        formatter = click.get_current_context().make_formatter()
        formatter.write_dl([(each, recipes.summary(each)) for each in recipes.names()])
        click.echo(formatter.getvalue(), nl=False)
    elif (recipe := recipes.shipped(name)) is not None:
        click.echo(recipe.read_text(encoding="utf-8"), nl=False)
    else:
        raise UserError(f"there is no recipe {name}, but {', '.join(recipes.names())}")
