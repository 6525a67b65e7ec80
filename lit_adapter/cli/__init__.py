"""The command lines: one module a command, each parsed before anything heavy is imported.

`main` chooses the command of ``lit-adapter COMMAND``, `command` is what all of them share, and `config_file`
checks the configuration files of `finetune`. The other commands are `quickstart`, `download`, `convert`,
`generate`, `convert_adapter`, `merge` and `push`; every one has a door of its name in ``scripts/`` too.
"""
