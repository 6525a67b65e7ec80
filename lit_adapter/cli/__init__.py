"""The command lines: one module a command, each parsed before anything heavy is imported.

`main` chooses the command of ``lit-adapter COMMAND``, `command` is what all of them share, and `config_file`
checks the configuration files of `finetune`.
"""
