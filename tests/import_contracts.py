"""The contract type `allowed` of import-linter: a list of what a package may import, where all else is refused."""

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class AllowedImports(Contract):
    """Every direct import of `source` is of itself, of `allowed`, or of an external package.

    A name in `allowed` stands for the module and all in it. Where `external` is given, external packages are refused
    too unless they are listed there. The standard library is not looked at.
    """

    source = fields.StringField()
    allowed = fields.ListField(subfield=fields.StringField())
    external = fields.ListField(subfield=fields.StringField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Compare each import with the lists."""
        internal = {module.split(".")[0] for module in graph.modules if not graph.is_module_squashed(module)}
        accepted = (self.source, *self.allowed, *(self.external or ()))
        faults = []
        for module in sorted({self.source, *graph.find_descendants(self.source)}):
            for imported in sorted(graph.find_modules_directly_imported_by(module)):
                package = imported.split(".")[0]
                if package not in internal and (self.external is None or package in sys.stdlib_module_names):
                    continue
                if not any(imported == name or imported.startswith(f"{name}.") for name in accepted):
                    faults.append(f"{module} imports {imported}")
        return ContractCheck(kept=not faults, metadata={"faults": faults})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print each import that is not allowed, and what is."""
        for fault in check.metadata["faults"]:
            output.print_error(fault, bold=False)
        output.print(f"accepted: {', '.join((*self.allowed, *(self.external or ())))}")
