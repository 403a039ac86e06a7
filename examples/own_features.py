# %% [markdown]
# # Features that you already have
#
# Heads take arrays. `featcache import` makes a store from feature files, for the command line and for checked
# evaluation.

# %%
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import heads

X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X.astype(np.float32), y, random_state=0)

# %% [markdown]
# One eigendecomposition serves every alpha; `path_heads` returns a head for each.

# %%
ridge = heads.Ridge().fit(X_train, y_train)
print(f"ridge: {ridge.score(X_test, y_test):.1%}, {len(ridge.path_heads())} heads on its path")

# %% [markdown]
# Heads work in scikit-learn's pipelines, searches and plots.

# %%
search = GridSearchCV(make_pipeline(StandardScaler(), heads.KNN()), {"knn__n_neighbors": [1, 5, 20]}, cv=3)
search.fit(X_train, y_train)
print(search.best_params_, f"{search.score(X_test, y_test):.1%}")
ConfusionMatrixDisplay.from_estimator(ridge, X_test, y_test)
