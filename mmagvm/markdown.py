"""Markdown pages that a command writes in part."""


def filled(page: str, name: str, text: str) -> str:
    """A page with ``text`` between its two comments that carry ``name``.

    A page without these comments gets them at its end.
    """
    begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
    if begin not in page:
        page += f'{begin}\n{end}\n'
    before, rest = page.split(begin, 1)
    after = rest.split(end, 1)[1]
    return f'{before}{begin}\n{text.strip()}\n{end}{after}'
