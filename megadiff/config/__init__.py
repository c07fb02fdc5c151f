"""Run descriptions: YAML files and `key=value` words in, a frozen typed tree or one sentence for each mistake out.

`load` lays the `nodes` of files and overrides upon each other, pydantic types them, and `messages` words what
pydantic refuses, with file and line. `registry` finds the members of families and joins their settings to a
section; `schema` and `reference` list the keys; `suggestions` and `command_line` serve suggestions.
"""
