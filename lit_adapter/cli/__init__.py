"""The command lines: one module per command, each parsed before anything heavy is imported.

`main` chooses the command of ``lit-adapter COMMAND``, `command` has what all of them share, and `config_file`
checks the configuration files of `finetune`.
"""
