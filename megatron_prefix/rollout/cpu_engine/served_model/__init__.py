"""SGLang's external model package: it looks for ``EntryClass`` in the modules of this one."""
