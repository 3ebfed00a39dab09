"""The one exception for a user's mistake."""


class UserError(Exception):
    """Something the user can mend: one sentence that names the field (or file and line) and the fix.

    Entry points print it without a trace and exit with code 2.
    """
