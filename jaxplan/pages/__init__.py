"""Room `pages`: a plan as one HTML page, and tables for notebooks.

    nouns.py     what a page shows, without HTML
    gather.py    that, from a plan
    saved.py     that, from a saved plan alone
    collapse.py  layers that look alike become one block
    html.py      the page
    page.css, page.js   its style sheet and its script
    notebook.py  tables for notebooks
"""

from jaxplan.pages.gather import picture_of, sweep_view
from jaxplan.pages.html import page
from jaxplan.pages.notebook import fragment, plan_table
from jaxplan.pages.nouns import Picture, SweepView
from jaxplan.pages.saved import picture_of_saved

__all__ = ["Picture", "SweepView", "fragment", "page", "picture_of", "picture_of_saved", "plan_table", "sweep_view"]
