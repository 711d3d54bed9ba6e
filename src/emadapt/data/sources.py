"""Public datasets: where they are, what they weigh in on paper (licence, citation) and how their files lie.

The sha256 are those that another project's loaders publish for these archives; they were not checked here, as neither
archive could be reached. A download that does not match is refused, whichever side is wrong.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Volume:
    """A folder of images and one of labels, one file a slice, paired by the number in the name."""

    image_dir: str
    image_pattern: str  # of the whole file name; the group is the slice's number
    label_dir: str
    label_pattern: str


LAYOUTS: dict[str, tuple[Volume, ...]] = {
    # Not a mistake: the images are called mask0000.png, the labels 0.png. Sorted by name, the two do not pair.
    "lucchi": (
        Volume("Train_In", r"mask(\d+)\.png", "Train_Out", r"(\d+)\.png"),
        Volume("Test_In", r"mask(\d+)\.png", "Test_Out", r"(\d+)\.png"),
    ),
    "vnc": (Volume("raw", r"(\d+)\.tiff?", "mitochondria", r"(\d+)\.png"),),
}


@dataclass(frozen=True)
class Source:
    """A public dataset."""

    name: str
    layout: str  # a key of LAYOUTS
    urls: tuple[str, ...]  # of one zip archive, mirrors last
    sha256: str  # of the archive
    archive_root: str  # the folder in the archive that has the layout
    licence: str
    citation: str
    doi: str  # of the citation
    voxel_nm: tuple[float, float, float]  # z, y, x
    foreground: str  # label rule, as in params.yaml
    note: str


SOURCES: dict[str, Source] = {
    "lucchi": Source(
        name="lucchi",
        layout="lucchi",
        urls=(
            "http://www.casser.io/files/lucchi_pp.zip",
            # A copy by PyTorch Connectomics; used only if it is the same archive to the byte.
            "https://huggingface.co/datasets/pytc/tutorial/resolve/main/Lucchi%2B%2B.zip",
        ),
        sha256="770ce9e98fc6f29c1b1a250c637e6c5125f2b5f1260e5a7687b55a79e2e8844d",
        archive_root="Lucchi++",
        licence="research use; cite both papers",
        citation=(
            "Lucchi et al., Supervoxel-based segmentation of mitochondria in EM image stacks with learned shape features, "
            "IEEE Transactions on Medical Imaging 31 (2012). Labels: Casser et al., Fast mitochondria detection for "
            "connectomics, MIDL 2020."
        ),
        doi="10.1109/TMI.2011.2171705",
        voxel_nm=(5.0, 5.0, 5.0),
        foreground=">127",
        note="EPFL CA1 hippocampus, FIB-SEM, with the corrected labels called Lucchi++; official train and test halves.",
    ),
    "vnc": Source(
        name="vnc",
        layout="vnc",
        urls=("https://github.com/unidesigner/groundtruth-drosophila-vnc/archive/refs/heads/master.zip",),
        sha256="f7bd0db03c86b64440a16b60360ad60c0a4411f89e2c021c7ee2c8d6af3d7e86",
        archive_root="groundtruth-drosophila-vnc-master/stack1",
        licence="CC BY-NC-SA 3.0",
        citation=(
            "Gerhard, Funke, Martel, Cardona, Fetter, Segmented anisotropic ssTEM dataset of neural tissue, figshare (2013), "
            "doi 10.6084/m9.figshare.856713."
        ),
        doi="10.6084/m9.figshare.856713",
        voxel_nm=(50.0, 4.6, 4.6),
        foreground=">127",  # the masks are anti-aliased
        note="Drosophila larva ventral nerve cord, serial-section TEM, the annotated stack 1; 20 sections, no official split.",
    ),
}
